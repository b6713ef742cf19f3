// A heat map's rows: parameters, or the modules they are in, which a click opens; a filter; each row by its own median.
// What came with the page stays in plot.whole; heat.meta holds the norm's power (null: inf), a parameter to show, whether
// the first row marks what was not finite, and words in the reader's language.
const MOST = 100, LABELS = 48, LONGEST = innerWidth < 700 ? 14 : 26;
const modulesOf = (name) => name.split(".").map((_, i, parts) => parts.slice(0, i + 1).join("."));
const rowOf = (name, depth, opened) =>
  modulesOf(name).find((prefix, i) => i + 1 >= depth && !opened.has(prefix)) ?? name;
const groups = (names, depth, opened) => {
  const found = new Map();
  names.forEach((name, i) => {
    const row = rowOf(name, depth, opened);
    found.set(row, [...(found.get(row) ?? []), i]);
  });
  return [...found].map(([row, all]) => [all.length > 1 ? row : names[all[0]], all]);
};
const normOf = (values, power) => {
  const known = values.filter((value) => value !== null);
  if (!known.length) return null;
  const most = Math.max(...known);
  return power === null || !most ? most : most * known.reduce((sum, v) => sum + (v / most) ** power, 0) ** (1 / power);
};
const median = (values) => values.filter((v) => v > 0).sort((a, b) => a - b).at(-values.length / 2 | 0) ?? null;
const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

const controls = (plot) => {
  const { names, meta } = plot.whole, deepest = Math.max(...names.map((name) => name.split(".").length));
  const box = document.createElement("div");
  box.className = "rows";
  const [hint, every, deep, relative] = meta.words.map(escaped);
  box.innerHTML = `<input type="search" placeholder="${hint}" aria-label="${hint}">
    <select></select><label><input type="checkbox"> ${relative}</label>`;
  const [filter, select, check] = box.querySelectorAll("input[type=search], select, input[type=checkbox]");
  const choices = [[Infinity, every]];
  for (let depth = 1; depth < deepest; depth++) choices.push([depth, deep.replace("#", depth)]);
  select.append(...choices.map(([value, text]) => new Option(text, value)));
  const fits = choices.slice(1).filter(([depth]) => groups(names, depth, new Set()).length <= MOST).at(-1);
  const opened = new Set();
  if (names.length > MOST && fits) {
    select.value = fits[0];
    if (meta.onset) modulesOf(meta.onset).forEach((prefix) => opened.add(prefix));
  }
  plot.rows = { filter, select, check, opened };
  filter.oninput = check.onchange = () => arrange(plot);
  select.onchange = () => { opened.clear(); arrange(plot); };
  plot.on("plotly_click", ({ points: [point] }) => {
    if (point.curveNumber || plot.whole.names.includes(point.y)) return;
    opened.add(point.y);
    arrange(plot);
  });
  plot.closest(".figure").prepend(box);
};

// Draws the rows that are asked for; fresh where plotly has just been given the whole map.
const arrange = async (plot, fresh) => {
  if (fresh) {
    const { y, z, customdata, zmin, zmax, colorbar, meta } = plot.data[0], plain = document.createElement("textarea");
    const names = y.map((name) => { plain.innerHTML = name; return plain.value; });
    plot.whole = { names, z, customdata, zmin, zmax, colorbar, meta };
    if (!plot.rows) controls(plot);
  }
  const { whole } = plot, { filter, select, check, opened } = plot.rows;
  const wanted = filter.value.trim().toLowerCase().split("*").map((part) => part.replace(/[.+?^${}()|[\]\\]/g, "\\$&"));
  const pattern = new RegExp(wanted.length > 1 ? `^${wanted.join(".*")}$` : wanted[0]);
  const top = whole.meta.marked ? 1 : 0;
  const kept = whole.names.map((_, i) => i).slice(top).filter((i) => pattern.test(whole.names[i].toLowerCase()));
  const found = groups(kept.map((i) => whole.names[i]), wanted.join("") ? Infinity : Number(select.value), opened);
  const rows = found.map(([name, all]) => {
    const lines = all.map((i) => whole.customdata[kept[i]]);
    const values = lines.length > 1 ? lines[0].map((_, j) => normOf(lines.map((line) => line[j]), whole.meta.power)) : lines[0];
    const usual = check.checked ? median(values) : 1;
    return { name, values, logs: values.map((value) => (value > 0 && usual ? Math.log10(value / usual) : null)),
      label: lines.length > 1 ? `▸ ${name}` : name };
  });
  if (top) rows.unshift({ name: whole.names[0], label: whole.names[0], values: whole.customdata[0], logs: whole.z[0] });
  let { zmin, zmax, colorbar } = whole;
  if (check.checked || found.length < kept.length) {
    const logs = rows.flatMap((row) => row.logs.filter((log) => log !== null)).sort((a, b) => a - b);
    zmin = check.checked ? -1 : logs[Math.floor(logs.length / 50)] ?? 0;
    zmax = Math.max(check.checked ? 1 : zmin + 0.5, Math.min(logs.at(-1) ?? 0, zmin + 12));
    const first = Math.ceil(zmin), stride = Math.max(1, Math.ceil((zmax - zmin) / 5));
    const at = Array.from({ length: Math.floor((zmax - first) / stride) + 1 }, (_, i) => first + i * stride);
    const texts = at.map((t) => (check.checked ? (t < 0 ? `÷${10 ** -t}` : `×${10 ** t}`) : `10<sup>${t}</sup>`));
    colorbar = { ...colorbar, tickvals: at, ticktext: texts };
  }
  const names = rows.map((row) => escaped(row.name)), every = Math.ceil(rows.length / LABELS);
  const shown = rows.map((row, i) => [names[i], row.label]).filter((_, i) => i % every === 0);
  const short = (text) => escaped(text.length > LONGEST ? "…" + text.slice(1 - LONGEST) : text);
  await Plotly.update(plot,
    { y: [names], z: [rows.map((row) => row.logs)], customdata: [rows.map((row) => row.values)], zmin, zmax, colorbar },
    { "yaxis.categoryarray": names, "yaxis.tickvals": shown.map(([name]) => name),
      "yaxis.ticktext": shown.map(([, label]) => short(label)),
      height: Math.min(1000, Math.max(260, 140 + 20 * rows.length)), autosize: true }, [0]);
  align();
};
for (const plot of plots) if (plot.data[0]?.meta && plot.data[0].type === "heatmap") arrange(plot, true);
