// Search: which latents a query, a filter and an order show.
const DENSE = 0.1;  // latents that fire on more tokens than this share are dense
const NUMBERS = /^\d+(-\d+)?([,\s]+\d+(-\d+)?)*,?$/;

function parseNumbers(query) {
  const plain = query.replace(/\s*[-\u2013\u2014]\s*/g, "-").trim();
  if (!NUMBERS.test(plain)) return null;
  return plain.split(/[,\s]+/).filter(part => part).map(part => {
    const [low, high = low] = part.split("-").map(Number);
    return [Math.min(low, high), Math.max(low, high)];
  });
}

// The tokens that a query means: those equal to it, up to case and spaces around; if there are none, those that contain it.
function findTokens(query) {
  const quoted = query.match(/^"(.*)"$/), wanted = (quoted ? quoted[1] : query.trim()).toLowerCase();
  const equal = new Set(), containing = new Set();
  for (const [id, token] of spelled) {
    const lower = token.toLowerCase();
    if (quoted ? lower === wanted : lower.trim() === wanted) equal.add(id);
    else if (!quoted && lower.includes(wanted)) containing.add(id);
  }
  return equal.size || quoted ? { ids: equal, how: "the token" } : { ids: containing, how: "a token that contains" };
}

// The largest absolute activation: a signed latent may fire negatively alone.
const peakOf = i => Math.max(columns.max[i], -columns.min[i]);

const FILTERS = {
  firing: ["that fire", i => columns.density[i] > 0],
  all: ["all", () => true],
  dead: ["dead: never fire", i => columns.density[i] === 0],
  dense: [`dense: above ${100 * DENSE} %`, i => columns.density[i] > DENSE],
};

function addFilters() {
  if (columns.group) meta.groups.sizes.forEach((size, g) => {
    FILTERS[`group-${g}`] = [`${meta.groups.name} ${g + 1} (${whole(size)} latents)`, i => columns.group[i] === g];
  });
  if (columns.class) for (const name of new Set(columns.class))
    FILTERS[`class-${name}`] = [className(name), i => columns.class[i] === name && columns.density[i] > 0];
}

const ORDERS = {
  best: ["number, or best match", null],
  density: ["density, densest first", i => -columns.density[i]],
  rare: ["density, rarest first", i => columns.density[i]],
  max: ["largest activation", i => -peakOf(i)],
};

function addOrders() {
  if (columns.min.some(x => x < 0)) ORDERS.min = ["most negative activation", i => columns.min[i]];
  if (columns.relative_norm) ORDERS.tuned = ["relative norm", i => -columns.relative_norm[i]];
}

// Rows of the columns to show, in their order, and a sentence about them.
async function findRows({ q, where, show, sort }) {
  const ranges = parseNumbers(q), every = columns.latent.map((_, i) => i);
  let rows = every, weight = null, note = "";
  if (ranges) rows = every.filter(i => ranges.some(([low, high]) => low <= columns.latent[i] && columns.latent[i] <= high));
  else if (q.trim()) {
    const index = await block("search"), { ids, how } = findTokens(q);
    weight = new Map();
    const { counts, tokens, shares } = index[where];
    let at = 0;
    counts.forEach((count, i) => {
      for (const end = at + count; at < end; at++)
        if (ids.has(tokens[at])) weight.set(i, (weight.get(i) ?? 0) + shares[at]);
    });
    rows = every.filter(i => weight.has(i));
    note = ` ${where === "fires" ? "fire on" : "promote"} ${how} “${q.trim()}”`;
  }
  if (!ranges || show !== "firing") rows = rows.filter(FILTERS[show][1]);
  const key = ORDERS[sort][1] ?? (weight && (i => -weight.get(i)));
  if (key) { const keys = new Map(rows.map(i => [i, key(i)])); rows.sort((a, b) => keys.get(a) - keys.get(b) || a - b); }
  return { rows, note: `${whole(rows.length)} of ${whole(every.length)} latents${note}` };
}
