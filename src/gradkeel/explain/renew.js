// New figures take the place of the old ones in their elements, so that a zoom stays; plotly's script, megabytes, is not
// sent again. Where the page has other sections than before, it is loaded anew.
const sections = (page) => [...page.querySelectorAll("main > section")];
const keep = (id, data, layout, config) => {
  const old = document.getElementById(id).layout;
  layout.dragmode = old.dragmode;
  for (const axis of ["xaxis", "xaxis2"])
    if (old[axis]?.autorange === false && layout[axis])
      Object.assign(layout[axis], { range: old[axis].range, autorange: false });
  layout.margin = { ...layout.margin, l: old.margin.l, r: old.margin.r };
  const plot = document.getElementById(id);
  return Plotly.react(id, data, layout, config).then(() => plot.rows && arrange(plot, true));
};
const renew = async () => {
  const version = await (await fetch("version")).text();
  if (version === shown) return;
  const page = new DOMParser().parseFromString(await (await fetch("content")).text(), "text/html");
  const ids = (page) => sections(page).map((one) => one.id + !!one.querySelector(".figure")).join();
  if (ids(page) !== ids(document)) { location.reload(); return; }
  for (const tag of ["h1", ".subtitle", "dl"])
    document.querySelector(tag).replaceWith(page.querySelector(tag));
  sections(page).forEach((fresh, i) => {
    const old = sections(document)[i];
    for (const tag of [":scope > p", ".scroll"]) {
      const [a, b] = [old.querySelector(tag), fresh.querySelector(tag)];
      if (a && b) a.replaceWith(b);
    }
    for (const script of fresh.querySelectorAll(".figure script"))
      new Function("Plotly", script.textContent)({ newPlot: keep });
  });
  shown = version;
};
setInterval(() => renew().catch(() => { /* training has ended */ }), 2000);
