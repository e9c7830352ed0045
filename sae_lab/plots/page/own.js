// Your own text: which latents fire on it. A click on a latent colours its tokens, one on a token lists its latents.
function showOwn(found) {
  const spans = found.tokens.map((token, i) => {
    const span = element("span", found.read[i] ? {} : { class: "unread", title: "not read by the SAE" }, token);
    span.onclick = () => pick(i);
    return span;
  });
  const byToken = found.tokens.map(() => []);
  for (const row of found.latents) for (const [i, value] of row.values) byToken[i].push({ ...row, value });
  const list = element("div", { class: "chips" }), title = element("h3"), back = element("button", { type: "button" }, "all latents");
  const clear = () => spans.forEach(span => { span.style.backgroundColor = ""; span.classList.remove("picked"); span.title = ""; });
  const fill = (name, rows, value) => {
    title.replaceChildren(name);
    list.replaceChildren(...rows.map(row => {
      const button = element("button", { type: "button" }, `${row.latent}`, element("small", {}, number(value(row))));
      button.onclick = () => colourBy(row, button);
      return button;
    }));
  };
  const colourBy = (row, button) => {
    clear();
    for (const [i, value] of row.values) { colour(spans[i], value, Math.abs(row.max)); spans[i].title = number(value); }
    for (const other of list.children) other.classList.toggle("on", other === button);
    opened.replaceChildren("latent ", latentLink(row.latent), ` fires on ${whole(row.values.length)} of the tokens`);
  };
  const pick = i => {
    clear();
    spans[i].classList.add("picked");
    fill(`Latents that fire on “${alone(found.tokens[i])}”`, byToken[i].sort((a, b) => Math.abs(b.value) - Math.abs(a.value)), row => row.value);
    opened.replaceChildren(back);
  };
  const everything = () => {
    clear();
    const n = found.latents.length;
    fill(`${whole(found.n_active)} latents fire${n < found.n_active ? `; the ${n} strongest` : ""} (largest activation)`, found.latents, row => row.max);
    opened.replaceChildren();
    if (list.firstChild) list.firstChild.click();
  };
  const opened = element("p", { class: "muted" });
  back.onclick = everything;
  $("owned").replaceChildren(element("p", { class: "text" }, ...spans), title, list, opened);
  everything();
}

async function ask(event) {
  event.preventDefault();
  $("answer").textContent = "running the model …";
  try {
    const response = await fetch("activations", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ text: $("typed").value }) });
    const found = await response.json();
    $("answer").textContent = found.error ?? "";
    if (!found.error) showOwn(found);
  } catch {
    $("answer").textContent = "The server does not answer: start `features serve=true` again.";
  }
}

async function startOwn() {
  const served = meta.served && location.protocol.startsWith("http");
  $("own").hidden = !served && !meta.own;
  $("ask").hidden = !served;
  $("ask").onsubmit = ask;
  $("typed").onkeydown = event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit(); };
  if (meta.own) showOwn(meta.own);
}
