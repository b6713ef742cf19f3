// Figures over the same x axis (their layout's meta) are zoomed together, and those over the steps have one width.
// On touch screens dragging scrolls the page.
const plots = [...document.querySelectorAll(".js-plotly-plot")];
let linking = false;
const align = () => {
  const over = plots.filter((plot) => plot.layout.meta === "step");
  if (innerWidth < 700 || over.length < 2) return;
  const sides = over.map((plot) => ["l", "r"].map((side) => Math.round(plot._fullLayout._size[side])));
  const [l, r] = [0, 1].map((side) => Math.max(...sides.map((own) => own[side])));
  over.forEach((plot, i) => {
    if (sides[i][0] < l || sides[i][1] < r) Plotly.relayout(plot, { "margin.l": l, "margin.r": r });
  });
};
for (const plot of plots) {
  if (matchMedia("(pointer: fine)").matches) Plotly.relayout(plot, { dragmode: "zoom" });
  plot.on("plotly_relayout", async (change) => {
    const [low, high] = ["[0]", "[1]"].map((end) => change["xaxis.range" + end] ?? change["xaxis2.range" + end]);
    const all = change["xaxis.autorange"] || change["xaxis2.autorange"];
    if (linking || !plot.layout.meta || (low === undefined && !all)) return;
    linking = true;
    const same = plots.filter((one) => one !== plot && one.layout.meta === plot.layout.meta);
    const axes = (one) => ["xaxis", "xaxis2"].filter((axis) => one.layout[axis]);
    const update = (one) => Object.fromEntries(
      axes(one).map((axis) => all ? [axis + ".autorange", true] : [axis + ".range", [low, high]]));
    try { await Promise.all(same.map((one) => Plotly.relayout(one, update(one)))); } finally { linking = false; }
  });
}
