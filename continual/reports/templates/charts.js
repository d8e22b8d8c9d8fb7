// How numbers are written

const units = (value, names, base) => {
  const power = Math.min(names.length - 1, value >= 1 ? Math.floor(Math.log(value) / Math.log(base) + 1e-9) : 0);
  return `${+(value / base ** power).toPrecision(3)} ${names[power]}`;
};
const seconds = value => value < 60 ? `${+value.toPrecision(2)} s` : value < 3600 ? `${+(value / 60).toPrecision(3)} min`
  : `${+(value / 3600).toPrecision(3)} h`;
const write = {
  percent: value => minus((100 * value).toFixed(1)),
  number: value => minus(String(+value.toPrecision(4))),
  count: value => value.toLocaleString("en").replaceAll(",", "\u2009"),
  bytes: value => units(value, ["B", "kB", "MB", "GB", "TB"], 1000),
  seconds,
};

// Charts: Vega-Lite draws each when it comes into view, the others while the page is idle

const COLOURS = 7, BANDS = 7, NAMED = 16; // more bands over one another hide the lines, more names one another
const DASHES = { faint: [1, 0], ceiling: [7, 5] };
const colour = look => ({ faint: "var(--line)", ceiling: "var(--soft)" })[look] ?? `var(--k${look % COLOURS})`;
const dash = look => DASHES[look] ?? (Math.floor(look / COLOURS) % 2 ? [5, 3] : [1, 0]);
const plain = { scale: null, legend: null };
const config = { background: null, font: getComputedStyle(document.body).fontFamily, view: { stroke: null }, aria: true,
  axis: { labelColor: "var(--soft)", titleColor: "var(--soft)", titleFontWeight: 500, gridColor: "var(--line)",
    domain: false, ticks: false, labelPadding: 6, labelFontSize: 12, titleFontSize: 12,
    labelFlush: false } };

function axis(of, more = {}) {
  const scaled = of.kind === "percent" ? 100 : 1;
  const whole = of.kind === "count" && { format: ",d", ...(of.span && { tickCount: Math.min(6, of.span[1] - of.span[0]) || 1 }) };
  return { type: "quantitative", title: of.title, scale: { nice: false, zero: false, ...(of.span && { domain:
    of.span.map(value => value * scaled) }), ...more.scale }, axis: { tickCount: 6, ...whole, ...more.axis } };
}

function lines(chart, width) {
  const scaled = chart.y.kind === "percent" ? 100 : 1, rows = [], bands = [], rings = [], ends = [];
  const series = chart.series.filter(one => chart.by === "group" ? shownGroup(one.name)
    : chart.by === "task" ? !state.without.has(one.name) : true);
  for (const one of series) {
    const look = { name: one.name, colour: colour(one.look), dash: dash(one.look), faint: one.look === "faint" };
    const wide = new Map(one.band.map(([x, low, high]) => [x, [low, high]]));
    const at = x => chart.x.names[x] ? `${chart.x.title} ${x} (${chart.x.names[x]})` : `${chart.x.title} ${write.count(x)}`;
    for (const [x, y] of one.points) {
      const [low, high] = wide.get(x) ?? [];
      const range = low === undefined ? "" : ` (${write[chart.y.kind](low)} to ${write[chart.y.kind](high)})`;
      rows.push({ ...look, x, y: y * scaled, dots: one.dots,
        says: `${one.name}, ${at(x)}: ${write[chart.y.kind](y)}${range}` });
    }
    for (const [x, low, high] of one.band) bands.push({ ...look, x, y: low * scaled, high: high * scaled });
    for (const [x, y] of one.rings) rings.push({ ...look, x, y: y * scaled, says: `${one.name}: learned here, ${write[chart.y.kind](y)}` });
    if (one.points.length) ends.push({ ...look, x: one.points.at(-1)[0], y: one.points.at(-1)[1] * scaled });
  }
  const height = chart.small ? 150 : 300, named = !chart.small && ends.length > 1 && ends.length <= NAMED;
  const spread = chart.y.span ?? around(rows.map(row => row.y / scaled));
  const y = axis({ ...chart.y, span: spread }, chart.small ? { axis: { title: null, tickCount: 3 } } : {});
  const x = axis(chart.x, { axis: { title: chart.small ? null : chart.x.title, grid: false } });
  const at = { x: { field: "x", ...x }, y: { field: "y", ...y }, color: { field: "colour", type: "nominal", ...plain },
    detail: { field: "name", type: "nominal" } };
  const lit = { condition: { param: "near", value: 1, empty: true }, value: 0.18 };
  const layer = [];
  if (chart.walls.length) {
    const values = chart.walls.map(([x, name]) => ({ x, name }));
    layer.push({ data: { values }, mark: { type: "rule", color: "var(--soft)", strokeDash: [2, 3], opacity: 0.6, aria: false },
      encoding: { x: { field: "x", ...x } } });
    layer.push({ data: { values }, mark: { type: "text", align: "left", baseline: "bottom", dx: 3, y: -2,
      limit: width / (values.length + 1), color: "var(--soft)", aria: false },
      encoding: { x: { field: "x", ...x }, text: { field: "name" } } });
  }
  if (bands.length && series.length <= BANDS) layer.push({ data: { values: bands }, mark: { type: "area", opacity: 0.13, aria: false },
    encoding: { ...at, y2: { field: "high" } } });
  layer.push({ mark: { type: "line", strokeWidth: 2.2, strokeJoin: "round", strokeCap: "round" },
    encoding: { ...at, description: { field: "name" }, strokeDash: { field: "dash", type: "nominal", ...plain }, opacity: lit,
      strokeWidth: { condition: { test: "datum.faint", value: 1.2 }, value: 2.2 } } });
  layer.push({ transform: [{ filter: "!datum.faint" }], params: [{ name: "near", select: { type: "point", fields: ["name"],
    on: "pointerover", clear: "pointerout" } }], mark: { type: "point", filled: true, size: 34 },
    encoding: { ...at, tooltip: { field: "says" }, description: { field: "says" }, opacity: { condition: [{ param: "near", empty: false, value: 1 },
      { test: "datum.dots", value: 1 }], value: 0 } } });
  if (rings.length) layer.push({ data: { values: rings }, mark: { type: "point", size: 90, strokeWidth: 2.4, filled: false,
    fill: "var(--card)" }, encoding: { ...at, tooltip: { field: "says" }, description: { field: "says" } } });
  if (named) {
    const px = value => height * (1 - (value / scaled - spread[0]) / (spread[1] - spread[0] || 1));
    ends.sort((one, other) => other.y - one.y);
    apart(ends.map(end => px(end.y)), 15, height).forEach((place, i) => {
      ends[i].y = (spread[0] + (1 - place / height) * (spread[1] - spread[0])) * scaled;
    });
    layer.push({ data: { values: ends }, mark: { type: "text", align: "left", dx: 9, baseline: "middle", fontWeight: 600,
      fontSize: 13, limit: 180, aria: false }, encoding: { x: { field: "x", ...x }, y: at.y, color: at.color, text: { field: "name" }, opacity: lit } });
  }
  return { data: { values: rows }, height, padding: { left: 2, top: chart.walls.length ? 20 : 8, bottom: 2, right: 8 },
    layer };
}

// What an axis is divided by, and the name of that unit, so that its numbers are short.
function unitOf(axis, most) {
  const units = { percent: [[0.01, ""]], bytes: [[1e9, ", GB"], [1e6, ", MB"], [1e3, ", kB"], [1, ", B"]],
    seconds: [[3600, ", h"], [60, ", min"], [1, ", s"]], count: [[1e9, ", billions"], [1e6, ", millions"], [1, ""]] }[axis.kind];
  return units?.find(([size]) => most >= 2 * size) ?? units?.at(-1) ?? [1, ""];
}

function dots(chart) {
  const name = which => chart.free && state.axes.get(which) in chart.axes ? state.axes.get(which) : chart[which];
  const [across, up] = [name("x"), name("y")];
  const unit = Object.fromEntries([across, up].map(key => [key, unitOf(chart.axes[key], Math.max(0, ...chart.runs.map(run =>
    run.values[key] ?? 0)))]));
  const values = chart.runs.filter(run => shownRun(run) && run.values[across] != null && run.values[up] != null).map(run => {
    const [x, y] = [across, up].map(key => run.values[key] / unit[key][0]);
    const figures = [across, up].map(key => `${chart.axes[key].title.replace(", %", "")} ${write[chart.axes[key].kind](run.values[key])}`);
    return { x, y, name: run.group, colour: colour(data.groups.find(group => group.name === run.group)?.look ?? 0),
      says: `${run.text}: ${figures.join(", ")}` };
  });
  const encode = (key, field) => {
    const of = chart.axes[key], found = values.map(row => row[field]), low = Math.min(...found), high = Math.max(...found);
    const log = of.kind !== "percent" && low > 0 && high / low > 30;
    const edge = 0.06 * (high - low) || Math.abs(high) * 0.1 || 1;
    const domain = log ? [low / 1.3, high * 1.3] : [of.kind === "percent" ? low - edge : Math.max(0, low - edge), high + edge];
    const side = field === "y" ? (of.better === "higher" ? "up" : "down") : (of.better === "higher" ? "right" : "left");
    return { field, ...axis({ ...of, span: null, title: `${of.title}${unit[key][1]} (better: ${side})` },
      { scale: { domain: found.length ? domain : [0, 1], type: log ? "log" : "linear" } }) };
  };
  return { data: { values }, height: 300, padding: { left: 2, top: 8, bottom: 2, right: 12 }, layer: [{
    params: [{ name: "near", select: { type: "point", fields: ["name"], on: "pointerover", clear: "pointerout" } }],
    mark: { type: "point", filled: true, size: 110 }, encoding: { x: encode(across, "x"), y: encode(up, "y"),
      color: { field: "colour", type: "nominal", ...plain }, tooltip: { field: "says" }, description: { field: "says" },
      opacity: { condition: { param: "near", value: 0.9, empty: true }, value: 0.2 } } }] };
}

// From 0, or what is below it, to a little above the highest.
function around(values) {
  const low = Math.min(0, ...values), high = Math.max(0, ...values);
  return [low, high + 0.05 * (high - low) || 1];
}

// Rising places at least `gap` apart, near the wanted ones, none beyond `most` if they fit.
function apart(wanted, gap, most) {
  const places = [...wanted];
  for (let i = 1; i < places.length; i++) places[i] = Math.max(places[i], places[i - 1] + gap);
  for (let i = places.length - 1; i >= 0; i--) places[i] = Math.min(places[i], most - gap * (places.length - 1 - i));
  return places;
}

let library;
async function load() {
  const bytes = Uint8Array.from(atob(byId("vega").textContent), letter => letter.charCodeAt(0));
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(make("script", await new Response(unpacked).text()));
}

const figures = all("figure.chart"), drawn = new Map();
let turn = 0; // of what is chosen: a chart is drawn anew once for each

function draw(figure) {
  const before = drawn.get(figure);
  if (before?.turn === turn) return before.done;
  before?.view?.finalize();
  const mine = { turn };
  drawn.set(figure, mine);
  return mine.done = put(figure, mine);
}

async function put(figure, mine) {
  await (library ??= load());
  const chart = data.charts[figure.dataset.chart], plot = figure.querySelector(".plot");
  const spec = { ...(chart.kind === "dots" ? dots(chart) : lines(chart, plot.clientWidth)), width: "container",
    autosize: { type: "fit-x", contains: "padding" }, config, description: `${chart.title}; the numbers are below it` };
  const made = await vegaEmbed(plot, spec, { renderer: "svg", actions: false, ast: true, defaultStyle: false,
    tooltip: (_, event, item, value) => say(value == null ? "" : String(value), event) });
  mine.view = made.view;
  if (drawn.get(figure) !== mine) made.view.finalize();
}

const seen = new Set();
const watch = new IntersectionObserver(entries => {
  for (const entry of entries) {
    entry.isIntersecting ? seen.add(entry.target) : seen.delete(entry.target);
    if (entry.isIntersecting) draw(entry.target);
  }
}, { rootMargin: "300px" });

const idle = work => window.requestIdleCallback ? requestIdleCallback(work, { timeout: 200 }) : setTimeout(work, 50);
function rest() {
  const next = figures.find(figure => drawn.get(figure)?.turn !== turn && figure.offsetParent);
  if (next) idle(() => draw(next).then(rest));
  else Promise.all([...drawn.values()].map(one => one.done)).then(() => { document.body.dataset.drawn = ""; });
}

function redraw() {
  turn++;
  delete document.body.dataset.drawn;
  for (const figure of figures) numbers(figure);
  for (const figure of seen) draw(figure);
  idle(rest);
}
addEventListener("beforeprint", () => figures.forEach(draw));

// A chart's numbers, as a table that is filled when it is opened
function numbers(figure) {
  const box = figure.querySelector(".numbers"), chart = data.charts[figure.dataset.chart];
  box.querySelector("table")?.remove();
  if (!box.open) return;
  const rows = chart.kind === "dots"
    ? [["run", ...Object.values(chart.axes).map(of => of.title.replace(", %", ""))], ...chart.runs.filter(shownRun).map(run =>
      [run.text, ...Object.entries(chart.axes).map(([key, of]) => run.values[key] == null ? "–" : write[of.kind](run.values[key]))])]
    : [["line", chart.x.title, chart.y.title, "from", "to"], ...chart.series.filter(one => one.look !== "faint"
      && (chart.by !== "group" || shownGroup(one.name))).flatMap(one => one.points.map(([x, y]) => {
      const [, low, high] = one.band.find(([at]) => at === x) ?? [];
      return [one.name, chart.x.names[x] ? `${x} ${chart.x.names[x]}` : write.count(x), ...[y, low, high].map(value =>
        value === undefined ? "–" : write[chart.y.kind](value))];
    }))];
  const table = make("table", "", { className: "plain" });
  rows.forEach((row, i) => {
    const line = table.insertRow();
    row.forEach(text => line.append(make(i ? "td" : "th", text)));
  });
  box.append(table);
}

for (const figure of figures) {
  const chart = data.charts[figure.dataset.chart];
  figure.querySelector(".numbers").addEventListener("toggle", () => numbers(figure));
  for (const select of all("select", figure)) {
    const which = select.dataset.axis;
    for (const [key, of] of Object.entries(chart.axes)) select.append(make("option", of.title, { value: key }));
    select.addEventListener("change", () => { state.axes.set(which, select.value); changed(); });
  }
  watch.observe(figure);
}

restore();
apply();
