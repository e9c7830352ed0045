// The page: its state is in the address, so that links, Back and Forward work.
const PER_PAGE = 20;
const START = { q: "", where: "fires", show: "firing", sort: "best" };
let state = START, shown = [], drawn = 0, turn = 0;

function readAddress() {
  const hash = location.hash.slice(1);
  if (/^\d+$/.test(hash)) return { ...START, q: hash };  // links to earlier pages
  const given = new URLSearchParams(hash), known = { where: { fires: 1, promotes: 1 }, show: FILTERS, sort: ORDERS };
  const read = key => key === "q" || Object.hasOwn(known[key], given.get(key)) ? given.get(key) : null;
  return Object.fromEntries(Object.entries(START).map(([key, value]) => [key, read(key) ?? value]));
}

function address(next) {
  const changed = Object.entries(next).filter(([key, value]) => value !== START[key]);
  return `#${new URLSearchParams(changed)}`;
}

// Show another state, as a new entry of the history; all that is typed in one go is one entry.
function go(next, typing = false) {
  const same = typing && history.state?.typing;
  if (!same) history.replaceState({ ...history.state, y: scrollY, n: drawn }, "");
  history[same ? "replaceState" : "pushState"]({ typing }, "", address(next));
  return draw();
}

async function draw() {
  const mine = ++turn, kept = history.state ?? {};
  state = readAddress();
  for (const key of ["where", "show", "sort"]) $(key).value = state[key];
  if (document.activeElement !== $("query") || !kept.typing) $("query").value = state.q;
  const { rows, note } = await findRows(state);
  if (mine !== turn) return;
  shown = rows; drawn = 0;
  highlighted = new Set(rows);
  $("found").textContent = note;
  $("list").replaceChildren();
  drawMap();
  await more(Math.max(PER_PAGE, kept.n ?? 0), mine);
  if (mine === turn) scrollTo(0, kept.y ?? (kept.typing ? scrollY : Math.min(scrollY, $("list").offsetTop - document.querySelector("header").offsetHeight - 8)));
  document.documentElement.dataset.drawn = String(mine);  // tests wait for it
}

async function more(n = PER_PAGE, mine = turn) {
  const some = shown.slice(drawn, drawn + n);
  drawn += some.length;
  const cards = await Promise.all(some.map(async i => card(await loadLatent(i))));
  if (mine !== turn) return;
  $("list").append(...cards);
  scrollToCentres(cards);
  $("more").hidden = drawn >= shown.length;
}

function fillControls() {
  addFilters();
  addOrders();
  for (const [id, table] of [["show", FILTERS], ["sort", ORDERS]])
    $(id).append(...Object.entries(table).map(([value, [name]]) => element("option", { value }, name)));
  $("query").oninput = () => go({ ...state, q: $("query").value }, true);
  $("query").onblur = () => history.replaceState({ ...history.state, typing: false }, "");
  $("controls").onsubmit = event => { event.preventDefault(); $("query").blur(); };
  for (const key of ["where", "show", "sort"]) $(key).onchange = () => go({ ...state, [key]: $(key).value });
  document.addEventListener("click", event => {
    const link = event.target.closest("a[href^='#']");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    go({ ...START, q: new URLSearchParams(link.getAttribute("href").slice(1)).get("q") });
  });
}

async function start() {
  await loadData();
  document.title = `Latents of ${meta.run}`;
  $("title").replaceChildren(`${meta.sae} on ${meta.lm}, ${meta.sites.join(", ")} `,
    element("small", {}, `${whole(meta.n_latents)} latents · ${whole(meta.n_tokens)} tokens read · ${meta.run}`));
  history.scrollRestoration = "manual";
  fillControls();
  startMap();
  await startOwn();
  addEventListener("popstate", draw);
  $("more").onclick = () => more();
  await draw();
  new IntersectionObserver(entries => { if (entries.some(e => e.isIntersecting) && !$("more").hidden) more(); }, { rootMargin: "600px" }).observe($("more"));
}

start();
