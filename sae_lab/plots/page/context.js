// Contexts: a line of text around an activation. A click shows the text around it, as it was written.
const WIDE = 100;  // tokens on either side of an activation for which the page holds the others of the same latent

// On a narrow screen a line may be cut before its activation: scroll it into sight. Positions are read before any is set.
function scrollToCentres(cards) {
  const lines = cards.flatMap(node => [...node.querySelectorAll(".context:not(.wide) .centre")]).map(centre => {
    const box = centre.parentNode, hidden = centre.offsetLeft + centre.offsetWidth + 40 - box.clientWidth;
    return [box, hidden > 0 && box.scrollWidth > box.clientWidth ? centre.offsetLeft - box.clientWidth / 2 : 0];
  });
  for (const [box, left] of lines) if (left > 0) {
    box.style.textOverflow = "clip";  // an ellipsis stays where it was before the line was scrolled, and hides what follows
    box.scrollLeft = left;
  }
}

function contextLine([centre, pairs], strongest, label) {
  const line = element("div", { class: "context", tabindex: 0, role: "button", "aria-expanded": "false" },
    element("i", {}, label ?? ""), element("div", { class: "text" }));
  const activations = new Map();
  for (let i = 0; i < pairs.length; i += 2) activations.set(centre + pairs[i], pairs[i + 1]);
  const fill = wide => {
    const start = centre - centre % meta.row, end = start + meta.row, around = wide ? WIDE : meta.context;
    const spans = [];
    for (let i = Math.max(start, centre - around); i < Math.min(end, centre + around + 1); i++) {
      const a = activations.get(i) ?? 0, shown = wide ? word(text[i]) : inText(word(text[i])), span = element("span", {}, shown);
      colour(span, a, strongest);
      if (a) span.title = `${alone(word(text[i]))}  ${number(a)}`;
      if (i === centre) span.className = a < 0 ? "centre negative" : "centre";
      spans.push(span);
    }
    line.lastChild.replaceChildren(...spans);
    line.lastChild.scrollLeft = 0;
    line.classList.toggle("wide", wide);
    line.setAttribute("aria-expanded", wide);
  };
  const toggle = () => { if (getSelection().isCollapsed) fill(!line.classList.contains("wide")); };
  line.onclick = toggle;
  line.onkeydown = event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(); } };
  fill(false);
  return line;
}
