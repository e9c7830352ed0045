// Cards: all that is known of one latent.
const peak = row => Math.max(row.max, -row.min);

function facts(row) {
  const list = [`density ${number(row.density)}`, `largest activation ${number(row.max)}`];
  if (row.min < 0) list.push(`most negative ${number(row.min)}`);
  if (row.norm !== undefined && Math.abs(row.norm - 1) > 0.001) list.push(`decoder norm ${number(row.norm)}`);
  return element("small", {}, list.join(" · "));
}

const CLASSES = { base_only: "base model only", tuned_only: "tuned model only", shared: "shared", between: "between the models" };
const className = name => CLASSES[name] ?? name;

function badges(row) {
  const names = [];
  if (row.density === 0) names.push("never fires");
  if (row.density > DENSE) names.push("dense");
  if (row.group !== undefined) names.push(`${meta.groups.name} ${row.group + 1} of ${meta.groups.sizes.length}`);
  if (row.class !== undefined) names.push(className(row.class));
  return names.map(name => element("span", { class: "badge" }, name));
}

function histogram(row) {
  const h = row.histogram, width = 290, height = 64, n = h.counts.length, step = width / n;
  const tallest = Math.log1p(Math.max(1, ...h.counts)), span = h.top - h.bottom || 1;
  const x = value => width * (value - h.bottom) / span, edge = i => h.bottom + span * i / n;
  const parts = h.counts.map((count, i) => {
    const tall = height * Math.log1p(count) / tallest;
    return drawing("rect", { x: i * step, y: height - tall + 10, width: step - 1, height: tall },
      drawing("title", {}, `${whole(count)} tokens, ${number(edge(i))} to ${number(edge(i + 1))}`));
  });
  const upright = (at, kind) => drawing("path", { d: `M${at} 10V${height + 10}`, class: kind });
  if (h.bottom < 0) parts.push(upright(x(0), "zero"));
  if (row.threshold !== undefined) for (const t of h.bottom < 0 ? [-row.threshold, row.threshold] : [row.threshold]) {
    if (t < h.bottom || t > h.top) continue;
    parts.push(upright(x(t), "line"), drawing("text", { x: Math.min(x(t) + 3, width - 70), y: 8, class: "mark" }, `threshold ${number(t)}`));
  }
  parts.push(drawing("text", { x: 0, y: height + 21 }, number(h.bottom)),
    drawing("text", { x: width, y: height + 21, "text-anchor": "end" }, number(h.top)));
  return drawing("svg", { viewBox: `0 0 ${width} ${height + 24}`, width, role: "img", "aria-label": "histogram of activations, log counts" }, ...parts);
}

function chips(kind, list, value) {
  return element("div", { class: `chips ${kind}` },
    ...list.map(item => element("span", { title: JSON.stringify(word(item.token)) }, alone(word(item.token)), element("small", {}, value(item)))));
}

function latentLink(latent) {
  return rowOf.has(latent) ? element("a", { href: `#q=${latent}` }, String(latent)) : element("span", {}, String(latent));
}

function links(list, value) {
  return element("div", { class: "chips" }, ...list.map(item => element("span", {}, latentLink(item.latent), element("small", {}, value(item)))));
}

function shares(names, values) {
  const most = Math.max(...values) || 1;
  return element("table", {}, ...names.map((name, i) => {
    const bar = element("i");
    bar.style.width = `${100 * values[i] / most}%`;
    return element("tr", {}, element("td", {}, name), element("td", { class: "bar" }, bar), element("td", {}, number(values[i])));
  }));
}

function aside(row) {
  const part = (name, node) => [element("h3", {}, name), node], logit = item => number(item.logit), some = list => list?.length;
  const reads = meta.sites.slice(0, meta.n_inputs), writes = meta.sites.slice(meta.n_inputs);
  return element("aside", {},
    ...part("Activations (log counts)", histogram(row)),
    ...(some(row.fires_on) ? part("Fires on (share of its activation)", chips("fires", row.fires_on, item => percent(item.share))) : []),
    ...(meta.n_inputs ? part("Reads and writes", element("div", { class: "muted" }, `${reads.join(", ")} → ${writes.join(", ")}`)) : []),
    ...(some(row.reads) ? part("Reads tokens (cosine with the embedding)", chips("promoted", row.reads, item => number(item.cosine))) : []),
    ...(row.writes ? part("Decoder norm by site", shares(writes, row.writes)) : []),
    ...(row.relative_norm !== undefined ? part("Relative norm of the tuned model", element("div", {}, number(row.relative_norm))) : []),
    ...(row.routed ? part("Share of its activations by site", shares(meta.sites, row.routed)) : []),
    ...(some(row.promoted) ? part("Promotes (logit)", chips("promoted", row.promoted, logit)) : []),
    ...(some(row.suppressed) ? part("Suppresses (logit)", chips("suppressed", row.suppressed, logit)) : []),
    ...(some(row.neighbours) ? part("Nearest latents (cosine)", links(row.neighbours, item => number(item.cosine))) : []),
    ...(some(row.cofiring) ? part("Fires together with (Jaccard)", links(row.cofiring, item => number(item.jaccard))) : []));
}

function contexts(row) {
  const section = element("section"), strongest = peak(row), value = context => number(context[1][context[1].indexOf(0) + 1]);
  const part = (name, lines) => { if (lines.length) section.append(element("h3", {}, name), ...lines); };
  for (const [name, title] of [["top", row.min < 0 ? "Most positive" : "Strongest"], ["bottom", "Most negative"], ["random", "Drawn at random"]])
    part(title, row[name].map(context => contextLine(context, strongest, value(context))));
  const n = row.deciles.length;
  part(n === 10 ? "Drawn from each tenth of its activations" : "All of its activations, by size", row.deciles.flatMap(([low, high, some], i) =>
    some.map((context, j) => contextLine(context, strongest, j ? "" : n === 10 ? `${90 - 10 * i}–${100 - 10 * i} %` : number(high)))));
  if (!section.children.length) section.append(element("p", { class: "muted" }, `Does not fire on the ${whole(meta.n_tokens)} tokens that were read.`));
  return section;
}

function card(row) {
  return element("article", { id: `latent-${row.latent}` },
    element("h2", {}, element("a", { href: `#q=${row.latent}` }, `latent ${row.latent}`), ...badges(row), facts(row)),
    contexts(row), aside(row));
}
