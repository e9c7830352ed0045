// Nodes. Text of others reaches the page through `append` and `setAttribute` only, never as HTML.
const $ = id => document.getElementById(id);
const number = x => x === 0 ? "0" : Math.abs(x) < 0.001 ? x.toExponential(1) : String(Number(x.toPrecision(3)));
const percent = x => x >= 0.0995 ? `${Math.round(100 * x)} %` : `${Number((100 * x).toPrecision(2))} %`;
const whole = x => x.toLocaleString("en");

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter(child => child !== null));
  return node;
}
const element = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
const drawing = (tag, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const hex = (character, digits) => character.charCodeAt(0).toString(16).toUpperCase().padStart(digits, "0");
const visible = text => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍")
  .replace(/[\x00-\x1f\x7f]/g, control => `<0x${hex(control, 2)}>`)  // as the bytes that are no whole character
  .replace(/[\x80-\x9f\u00ad\u200b-\u200f\u2028-\u202e\ufeff]/g, unseen => `<U+${hex(unseen, 4)}>`);
const inText = text => visible(text).replace(/ {3,}/g, "  ");  // or indentation would hide the text
const alone = text => visible(text).replace(/ /g, "·");

function colour(span, activation, strongest) {
  if (!activation) return;
  const strength = Math.min(1, Math.abs(activation) / (strongest || 1));
  span.style.backgroundColor = `rgba(var(--${activation > 0 ? "warm" : "cold"}), ${(0.1 + 0.65 * strength).toFixed(3)})`;
}
