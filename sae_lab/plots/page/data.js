// Data: blocks of this file, compressed and in base64, each decoded when it is asked for.
const CHUNK = 64;  // latents in a block
const decoded = new Map();

function block(name, as = "json") {
  if (!decoded.has(name)) decoded.set(name, decode(document.getElementById(`block-${name}`), as));
  return decoded.get(name);
}

async function decode(node, as) {
  const text = atob(node.textContent), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  node.remove();  // the decoded block takes its place
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const response = new Response(stream);
  return as === "json" ? response.json() : new Int32Array(await response.arrayBuffer());
}

// What the page knows from the beginning: the SAE, and columns with one number for each latent.
let meta, columns, spelled, text;
const rowOf = new Map();  // row of the columns by the latent's number

async function loadData() {
  meta = await block("meta");
  columns = meta.columns;
  columns.latent.forEach((latent, i) => rowOf.set(latent, i));
  const [tokens, ids] = await Promise.all([block("tokens"), block("text", "int32")]);
  spelled = new Map(tokens.ids.map((id, i) => [id, tokens.text[i]]));
  text = ids;
}

const loadLatent = async i => (await block(`latents-${Math.floor(i / CHUNK)}`))[i % CHUNK];
const word = id => spelled.get(id) ?? "�";
