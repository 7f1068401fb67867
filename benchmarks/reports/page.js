// The page's own script: draws the chart, sorts and filters the table. Text only ever goes in as text; nothing is loaded.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";

  const add = (parent, name, attributes = {}, text) => {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };

  const number = (v) => {
    if (v === null || v === undefined) return "";
    const size = Math.abs(v);
    if (size === 0) return "0";
    if (size < 1e-3 || size >= 999.5) return v.toExponential(1).replace("e+", "e");
    return String(Number(v.toPrecision(3)));
  };

  // --- scales

  const linear = (low, high, a, b) => (v) => a + ((v - low) / (high - low)) * (b - a);
  const log = (low, high, a, b) => {
    const place = linear(Math.log(low), Math.log(high), a, b);
    return (v) => place(Math.log(v));
  };

  const logTicks = (low, high) => {
    const decades = Math.log10(high / low);
    const steps = decades > 4 ? [1] : decades > 1.2 ? [1, 3] : [1, 2, 3, 5, 7];
    const every = Math.max(1, Math.ceil(decades / 8));
    const found = [];
    for (let k = Math.floor(Math.log10(low)); k <= Math.ceil(Math.log10(high)); k += 1) {
      if (k % every === 0) for (const s of steps) found.push(s * 10 ** k);
    }
    return found.filter((v) => v >= low && v <= high);
  };

  const linearTicks = (low, high) => {
    const rough = (high - low) / 5;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((s) => s * unit).find((s) => s >= rough);
    const found = [];
    for (let k = Math.ceil(low / step); k * step <= high; k += 1) found.push(k * step);
    return found;
  };

  // Ticks at the budgets, those that would touch a neighbour left out.
  const sparse = (values, place, gap) => {
    const found = [];
    for (const v of values) if (!found.length || place(v) - place(found[found.length - 1]) >= gap) found.push(v);
    return found;
  };

  const range = (series, points) => {
    const values = points.map((p) => p.y).sort((a, b) => a - b);
    const positive = values.filter((v) => v > 0);
    const floor = series.floor;
    const middle = values[Math.floor(values.length / 2)];
    if (!series.log || !positive.length) {
      const ends = points.flatMap((p) => [p.lo, p.y, p.hi]).concat(floor ? [floor.low, floor.high] : []);
      const known = ends.filter((v) => v !== null && Math.abs(v - middle) <= 50 * (Math.abs(middle) + 1e-12));
      let [low, high] = [Math.min(...known), Math.max(...known)];
      const pad = 0.06 * (high - low || Math.abs(high) || 1);
      return { log: false, low: low - pad, high: high + pad };
    }
    const top = Math.min(positive[positive.length - 1], 30 * Math.max(middle, positive[0]));
    // a floor far below every value would squeeze them: it is told in words instead
    const near = floor && floor.mean > 0 && floor.mean * 30 >= positive[0] ? [floor.mean, floor.high] : [];
    const low = Math.min(positive[0], ...near.filter((v) => v > 0));
    const high = Math.max(top, ...near);
    return { log: true, low: low / 1.5, high: high * 1.5 };
  };

  // --- marks: seven shapes around (0, 0), so that lines are told apart without colour

  const MARKS = [
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
    "M-3.6,-3.6H3.6V3.6H-3.6Z",
    "M0,-4.8L4.4,3.4H-4.4Z",
    "M0,-5L4.4,0L0,5L-4.4,0Z",
    "M0,4.8L4.4,-3.4H-4.4Z",
    "M-1.5,-4.6H1.5V-1.5H4.6V1.5H1.5V4.6H-1.5V1.5H-4.6V-1.5H-1.5Z",
    "M0,-5L1.5,-1.7L5,-1.5L2.3,0.8L3.1,4.3L0,2.4L-3.1,4.3L-2.3,0.8L-5,-1.5L-1.5,-1.7Z",
  ];
  const DASHES = ["", "7 4", "2 3", "10 3 2 3"];
  const look = (line) => ({
    colour: `k${line.colour % 7}`,
    mark: MARKS[line.colour % 7],
    dash: DASHES[line.dash % 4],
  });

  // --- the chart

  const outside = (p, r) => p.y > r.high || (r.log && p.y <= 0) || (!r.log && p.y < r.low);

  const chart = find("chart");
  const hidden = new Set();
  let lit = null;

  const current = () =>
    data.series.find((s) => s.model === find("model").value && s.metric === find("metric").value) || null;

  const draw = () => {
    const series = current();
    chart.replaceChildren();
    hide();
    if (!series) return;
    const width = Math.max(260, chart.clientWidth);
    const height = Math.round(Math.min(460, Math.max(300, 0.62 * width)));
    const box = { left: 56, right: width - 14, top: 14, bottom: height - 44 };
    const shown = series.lines.filter((l) => !hidden.has(l.id));
    const points = shown.flatMap((l) => l.points.map((p) => ({ ...p, line: data.lines[l.id], id: l.id })));
    const svg = add(chart, "svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
    const summary = `${series.metric} against network calls on ${series.model}; the table below holds the numbers`;
    svg.setAttribute("aria-label", summary);
    if (!points.length) {
      add(svg, "text", { x: width / 2, y: height / 2, class: "label", "text-anchor": "middle" }, "every line is hidden");
      return;
    }
    const r = range(series, points);
    const calls = [...new Set(points.map((p) => p.x))].sort((a, b) => a - b);
    const [first, last] = [calls[0], calls[calls.length - 1]];
    const X = log(first / 1.15, last * 1.15, box.left, box.right);
    const raw = (r.log ? log : linear)(r.low, r.high, box.bottom, box.top);
    const Y = (v) => Math.min(box.bottom, Math.max(box.top, r.log && v <= 0 ? box.bottom : raw(v)));
    axes(svg, box, series, r, X, Y, calls);
    floor(svg, box, series, r, Y);
    front(svg, series, X, Y, points);
    for (const line of shown) curve(svg, line, X, Y, r);
    if (points.some((p) => outside(p, r))) find("floor-note").append(" Dotted marks at the edge are off the scale.");
    svg.addEventListener("pointermove", (event) => hover(event, svg, points, X, Y));
    svg.addEventListener("pointerdown", (event) => hover(event, svg, points, X, Y));
    svg.addEventListener("pointerleave", hide);
  };

  const axes = (svg, box, series, r, X, Y, calls) => {
    const grid = add(svg, "g", { class: "grid" });
    for (const v of r.log ? logTicks(r.low, r.high) : linearTicks(r.low, r.high)) {
      add(grid, "line", { x1: box.left, x2: box.right, y1: Y(v), y2: Y(v) });
      add(svg, "text", { x: box.left - 7, y: Y(v) + 4, class: "tick", "text-anchor": "end" }, number(v));
    }
    for (const v of sparse(calls, X, 26)) {
      add(grid, "line", { x1: X(v), x2: X(v), y1: box.top, y2: box.bottom });
      add(svg, "text", { x: X(v), y: box.bottom + 17, class: "tick", "text-anchor": "middle" }, String(v));
    }
    const middle = (box.left + box.right) / 2;
    add(svg, "text", { x: middle, y: box.bottom + 36, class: "label", "text-anchor": "middle" }, "NFE: network calls");
    const unit = series.unit ? `, in ${series.unit}` : "";
    const way = series.lower ? "lower is better" : "higher is better";
    const better = series.two_sided ? "nearest to the floor is best" : series.floor ? `${way}, as far as the floor` : way;
    find("chart-title").textContent = `${series.metric}${unit}: ${better}`;
  };

  const floor = (svg, box, series, r, Y) => {
    const level = series.floor;
    const note = find("floor-note");
    if (!level) {
      note.textContent = "No floor is known here.";
      return;
    }
    const said = `Floor ${number(level.mean)}, from ${number(level.low) || "?"} to ${number(level.high) || "?"}`;
    const off = level.high < r.low || level.low > r.high;
    const where = level.high < r.low ? "below" : "above";
    const means = off ? `${where} this picture` : "values inside the grey band cannot be told from a perfect sampler";
    note.textContent = `${said}: ${means}. ${series.enough}`;
    if (off) return;
    const top = Y(Math.min(level.high ?? r.high, r.high));
    const bottom = Y(r.log && level.low <= 0 ? r.low : Math.max(level.low ?? r.low, r.low));
    const group = add(svg, "g", { class: "floor" });
    add(group, "rect", { x: box.left, y: top, width: box.right - box.left, height: Math.max(1, bottom - top) });
    if (level.mean >= r.low && level.mean <= r.high) {
      add(group, "line", { x1: box.left, x2: box.right, y1: Y(level.mean), y2: Y(level.mean) });
    }
    add(group, "text", { x: box.right - 4, y: Math.max(box.top + 12, top - 4), "text-anchor": "end" }, "floor");
  };

  // The Pareto front as steps: the best of whatever has at most so many calls.
  const front = (svg, series, X, Y, points) => {
    let best = null;
    let path = "";
    const on = [];
    for (const p of [...points].sort((a, b) => a.x - b.x || a.bad - b.bad)) {
      if (best !== null && p.bad >= best) continue;
      path += path ? `H${X(p.x)}V${Y(p.y)}` : `M${X(p.x)},${Y(p.y)}`;
      best = p.bad;
      on.push(p);
    }
    const end = Math.max(...points.map((p) => X(p.x)));
    add(svg, "path", { d: `${path}H${end}`, class: "front" });
    for (const p of on) add(svg, "circle", { cx: X(p.x), cy: Y(p.y), r: 8, class: "front-point" });
  };

  const curve = (svg, line, X, Y, r) => {
    const style = look(data.lines[line.id]);
    const dim = lit !== null && lit !== line.id ? " dim" : "";
    const group = add(svg, "g", { class: `line ${style.colour}${dim}` });
    const path = line.points.map((p, i) => `${i ? "L" : "M"}${X(p.x)},${Y(p.y)}`).join("");
    add(group, "path", { d: path, class: "curve", "stroke-dasharray": style.dash });
    for (const p of line.points) {
      if (p.lo !== null && p.hi !== null && p.hi > p.lo) {
        add(group, "path", { d: `M${X(p.x)},${Y(p.lo)}V${Y(p.hi)}m-3,0h6M${X(p.x) - 3},${Y(p.lo)}h6`, class: "bar" });
      }
      const at = `translate(${X(p.x)},${Y(p.y)})`;
      add(group, "path", { d: style.mark, transform: at, class: `mark${p.inside ? " inside" : ""}${outside(p, r) ? " out" : ""}` });
    }
  };

  // --- the tip

  const tip = find("tip");
  const hide = () => {
    tip.hidden = true;
  };

  const hover = (event, svg, points, X, Y) => {
    const frame = svg.getBoundingClientRect();
    const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
    let best = null;
    for (const p of points) {
      const d = Math.hypot(X(p.x) - x, Y(p.y) - y);
      if (d < 32 && (!best || d < best.d)) best = { p, d };
    }
    if (!best) {
      hide();
      return;
    }
    const p = best.p;
    const rows = [`${p.line.name}, NFE ${p.x}${p.x === p.budget ? "" : ` of ${p.budget}`}`, number(p.y)];
    if (p.lo !== null && p.hi !== null && p.hi > p.lo) rows[1] += `  [${number(p.lo)}, ${number(p.hi)}]`;
    if (p.inside) rows.push("within its floor");
    rows.push(`n = ${p.n}`);
    tip.replaceChildren(...rows.map((row) => Object.assign(document.createElement("div"), { textContent: row })));
    tip.hidden = false;
    const left = Math.min(X(p.x) + 12, frame.width - tip.offsetWidth - 4);
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${Math.max(0, Y(p.y) - tip.offsetHeight - 10)}px`;
  };

  // --- what is shown: the two choices and the legend

  const options = (select, values) => {
    const before = select.value;
    select.replaceChildren(...values.map((v) => new Option(v, v)));
    select.value = values.includes(before) ? before : values[0];
  };

  const legend = () => {
    const series = current();
    const list = find("legend");
    list.replaceChildren();
    for (const line of series ? series.lines : []) {
      const style = look(data.lines[line.id]);
      const button = document.createElement("button");
      button.type = "button";
      button.className = style.colour;
      button.setAttribute("aria-pressed", String(!hidden.has(line.id)));
      const key = add(button, "svg", { width: 30, height: 12, viewBox: "-15 -6 30 12", "aria-hidden": "true" });
      add(key, "path", { d: "M-15,0H15", class: "curve", "stroke-dasharray": style.dash });
      add(key, "path", { d: style.mark, class: "mark" });
      const name = document.createElement("span");
      name.textContent = data.lines[line.id].name;
      button.append(name);
      button.addEventListener("click", () => {
        if (!hidden.delete(line.id)) hidden.add(line.id);
        button.setAttribute("aria-pressed", String(!hidden.has(line.id)));
        lit = null;
        draw();
      });
      const light = (id) => () => {
        lit = id;
        for (const [i, g] of [...chart.querySelectorAll("g.line")].entries()) {
          const own = series.lines.filter((l) => !hidden.has(l.id))[i];
          g.classList.toggle("dim", id !== null && !hidden.has(id) && own.id !== id);
        }
      };
      button.addEventListener("pointerenter", light(line.id));
      button.addEventListener("pointerleave", light(null));
      list.append(button);
    }
  };

  const metrics = () =>
    options(
      find("metric"),
      data.series.filter((s) => s.model === find("model").value).map((s) => s.metric),
    );

  const choose = () => {
    metrics();
    const series = current();
    find("about").textContent = series ? data.models[series.model] || "" : "";
    legend();
    draw();
    filter();
  };

  // --- the table

  const body = find("rows").tBodies[0];
  const all = [...body.rows];
  const said = new Map(all.map((row) => [row, row.textContent.toLowerCase()]));

  const filter = () => {
    const words = find("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const only = find("only").checked;
    let count = 0;
    for (const row of all) {
      const here = !only || (row.dataset.model === find("model").value && row.dataset.metric === find("metric").value);
      row.hidden = !(here && words.every((w) => said.get(row).includes(w)));
      count += !row.hidden;
    }
    find("count").textContent = `${count} of ${all.length} rows`;
  };

  const sort = (column, header) => {
    const down = header.getAttribute("aria-sort") === "ascending";
    for (const other of find("rows").tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const numeric = header.classList.contains("n");
    const key = (row) => row.cells[column].dataset.v ?? (numeric ? "" : row.cells[column].textContent); // "–" is no number
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (!x || !y) return !x - !y; // rows without a value stay last, whichever way
      const order = numeric ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true });
      return down ? -order : order;
    };
    body.append(...[...body.rows].sort(compare));
  };

  for (const [column, header] of [...find("rows").tHead.rows[0].cells].entries()) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => sort(column, header));
  }

  // --- begin

  for (const id of ["model", "metric"]) find(id).addEventListener("change", choose);
  find("search").addEventListener("input", filter);
  find("only").addEventListener("change", filter);
  find("reset").addEventListener("click", () => {
    hidden.clear();
    choose();
  });
  document.body.classList.add("live");
  if (data.series.length) {
    options(find("model"), [...new Set(data.series.map((s) => s.model))]);
    choose();
    let width = 0;
    new ResizeObserver(() => {
      if (Math.abs(chart.clientWidth - width) < 1) return;
      width = chart.clientWidth;
      draw();
    }).observe(chart);
  } else {
    find("comparing").hidden = true;
    filter();
  }
})();
