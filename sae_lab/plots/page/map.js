// Map: density against a number of the latent, to click in. Latents that never fire stand at the left.
const AXES = { max: "largest activation", norm: "decoder norm", relative_norm: "relative norm of the tuned model" };
const MARGIN = { left: 46, right: 10, top: 8, bottom: 30 };
let points = [], highlighted = new Set();

function drawMap() {
  const canvas = $("canvas"), box = canvas.getBoundingClientRect(), style = getComputedStyle(document.documentElement);
  if (!box.width) return;
  const scale = devicePixelRatio || 1, pen = canvas.getContext("2d");
  canvas.width = box.width * scale; canvas.height = box.height * scale;
  pen.scale(scale, scale);
  pen.font = "10.5px system-ui, sans-serif";
  const name = $("axis").value, values = name === "max" ? columns.latent.map((_, i) => peakOf(i)) : columns[name], some = columns.density.filter(d => d > 0);
  const low = some.length ? Math.floor(Math.log10(some.reduce((a, b) => Math.min(a, b)))) : -3, width = box.width - MARGIN.left - MARGIN.right;
  let bottom = values.reduce((a, b) => Math.min(a, b), Infinity), top = values.reduce((a, b) => Math.max(a, b), -Infinity);
  if (name === "max") bottom = 0;
  if (name === "relative_norm") [bottom, top] = [0, 1];
  if (top - bottom < 1e-3) [bottom, top] = [bottom - 0.5, top + 0.5];
  const height = box.height - MARGIN.top - MARGIN.bottom, first = MARGIN.left + 46;
  const x = d => d > 0 ? first + (width - 46) * (Math.log10(d) - low) / -low : MARGIN.left + 8;
  const y = v => MARGIN.top + height * (1 - (v - bottom) / (top - bottom));
  const [muted, line, up] = ["--muted", "--line", "--up"].map(key => style.getPropertyValue(key));
  pen.fillStyle = muted; pen.strokeStyle = line;
  for (let e = low; e <= 0; e++) {
    const at = x(10 ** e);
    pen.beginPath(); pen.moveTo(at, MARGIN.top); pen.lineTo(at, MARGIN.top + height); pen.stroke();
    pen.textAlign = e === 0 ? "right" : "center"; pen.fillText(e === 0 ? "1" : e < -3 ? `1e${e}` : number(10 ** e), at, box.height - 17);
  }
  pen.textAlign = "center";
  pen.fillText("never", MARGIN.left + 8, box.height - 17); pen.fillText("density", first + (width - 46) / 2, box.height - 4);
  pen.textAlign = "right";
  for (let i = 0; i <= 4; i++) { const v = bottom + (top - bottom) * i / 4; pen.fillText(number(v), MARGIN.left - 6, y(v) + 4); }
  points = columns.latent.map((_, i) => [x(columns.density[i]), y(values[i])]);
  const all = highlighted.size === points.length || !highlighted.size, radius = points.length > 5000 ? 1.2 : 2.2;
  const dot = (i, r) => { pen.beginPath(); pen.arc(points[i][0], points[i][1], r, 0, 7); pen.fill(); };
  pen.fillStyle = all ? up : muted; pen.globalAlpha = all ? 0.55 : 0.25;
  points.forEach((_, i) => dot(i, radius));
  if (all) return;
  pen.fillStyle = up; pen.globalAlpha = 0.9;
  for (const i of highlighted) dot(i, highlighted.size < 30 ? 4 : radius);
}

function nearestPoint(event) {
  const box = $("canvas").getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  let best = -1, least = 20 ** 2;
  points.forEach(([a, b], i) => {
    const d = (a - x) ** 2 + (b - y) ** 2 - (highlighted.has(i) ? 0.5 : 0);
    if (d < least) [best, least] = [i, d];
  });
  return best;
}

function startMap() {
  for (const [name, title] of Object.entries(AXES))
    if (columns[name]) $("axis").append(element("option", { value: name }, `density against ${title}`));
  $("axis").onchange = drawMap;
  $("axis").onclick = event => event.preventDefault();
  $("map").ontoggle = drawMap;
  $("canvas").onclick = event => { const i = nearestPoint(event); if (i >= 0) go({ ...state, q: String(columns.latent[i]) }); };
  $("canvas").onmousemove = event => {
    const i = nearestPoint(event), tip = $("tip");
    tip.hidden = i < 0;
    if (i < 0) return;
    tip.textContent = `latent ${columns.latent[i]}: density ${number(columns.density[i])}, ${AXES[$("axis").value]} ${number(columns[$("axis").value][i])}`;
    tip.style.left = `${Math.max(0, Math.min(points[i][0] + 10, $("plot").clientWidth - tip.offsetWidth))}px`;
    tip.style.top = `${Math.max(0, points[i][1] - 28)}px`;
  };
  $("canvas").onmouseleave = () => { $("tip").hidden = true; };
  addEventListener("resize", drawMap);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
}
