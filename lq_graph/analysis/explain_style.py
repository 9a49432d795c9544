"""Style and script of the explain page. Without the script all of the page is readable."""

from __future__ import annotations

__all__ = ["CSS", "SCRIPT"]

# Colours: those of Okabe and Ito, darker on white and lighter on black until text on them, and they
# on the card, have a contrast of 4.5. Kinds differ by a pattern too.
CSS = """
:root { color-scheme: light dark;
  --page: light-dark(#f4f5f7, #101418); --card: light-dark(#fff, #191f26);
  --ink: light-dark(#1b2430, #e4e9ef); --quiet: light-dark(#535f6e, #a3afbd);
  --line: light-dark(#dfe3e8, #323b46); --link: light-dark(#0a5a9c, #7cc0ff);
  --warn: light-dark(#fff2d9, #3a2b0b); --edge: light-dark(#a85b00, #e0a23c);
  --k0: light-dark(#0072b2, #56b4e9); --k1: light-dark(#b84a00, #ff9d57);
  --k2: light-dark(#007a58, #35c79b); --k3: light-dark(#8a6500, #e6b93d);
  --k4: light-dark(#5d6775, #9ba7b5); }
:root[data-theme=light] { color-scheme: light; } :root[data-theme=dark] { color-scheme: dark; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; color: var(--ink);
  background: var(--page); }
main { max-width: 1320px; margin: 0 auto; padding: 24px 24px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 36px 0 8px; }
h3 { font-size: 15px; margin: 0; } h4 { font-size: 14px; margin: 16px 0 6px; }
h1, h2, h3, h4, .name { overflow-wrap: anywhere; } #quantized .name { min-width: 230px; }
p { margin: 4px 0 12px; max-width: 85ch; } a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; border-radius: 3px; }
:target { scroll-margin-top: 16px; outline: 2px solid var(--link); outline-offset: 2px; }
.quiet, small { color: var(--quiet); } small { font-size: 12.5px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 18px; min-width: 0; margin: 0 0 14px; }
.scroll { overflow-x: auto; }
.warn { background: var(--warn); border: 2px solid var(--edge); font-weight: 600; }
.warn p { margin: 0; max-width: none; }
header { display: flex; flex-wrap: wrap; gap: 4px 12px; justify-content: space-between; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 10px 0 16px; }
button, input { font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--quiet); border-radius: 6px; padding: 3px 10px; }
input { width: min(340px, 100%); padding: 5px 10px; }
.facts { display: grid; gap: 14px 28px;
  grid-template-columns: repeat(3, minmax(0, 1fr)); }
.facts b { display: block; font-size: 21px; line-height: 1.3; white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 0; }
dt { font-weight: 600; } dd { margin: 0; }
summary { cursor: pointer; } summary h3 { display: inline; }
.block > details > summary { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; }
.block > details > summary::before { content: "\\25B8"; color: var(--quiet); width: 10px; }
.block > details[open] > summary::before { content: "\\25BE"; }
.block > details > summary > h3 { flex: 0 1 auto; }
.badge { border: 1px solid var(--quiet); border-radius: 999px; padding: 0 9px; font-size: 13px;
  font-weight: 600; white-space: nowrap; }
table.small { font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: 14px; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { color: var(--quiet); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; } tr:last-child > * { border-bottom: 0; }
td.n, th.n { text-align: right; white-space: nowrap; } .nowrap { white-space: nowrap; }
th button { border: 0; background: none; padding: 0; font-weight: 600; text-align: inherit; }
th button { text-decoration: underline dotted; text-underline-offset: 3px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.meter { display: flex; height: 9px; width: 100%; min-width: 90px; margin: 4px 0 1px; }
.meter i { display: block; border-radius: 2px; }
.k0 { --k: var(--k0); } .k1 { --k: var(--k1); } .k2 { --k: var(--k2); } .k3 { --k: var(--k3); }
.k4 { --k: var(--k4); }
.fill, .cell { background: var(--k); }
.k1 .fill, .k1.cell, .k1.fill { background: repeating-linear-gradient(90deg, var(--k) 0 5px,
  transparent 5px 7px); }
.k3 .fill, .k3.cell, .k3.fill { background: repeating-linear-gradient(135deg, var(--k) 0 3px,
  transparent 3px 6px); }
.k4 .fill, .k4.cell, .k4.fill { background: none; box-shadow: inset 0 0 0 2px var(--k); }
.wait { border: 1px solid var(--k); }
.strips { display: grid; grid-template-columns: max-content 1fr; gap: 6px 12px; margin: 12px 0; }
.strip { display: flex; flex-wrap: wrap; gap: 2px; align-items: center; }
.cell { width: 12px; height: 16px; border-radius: 2px; }
.two > div > details { margin-top: 16px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; list-style: none;
  padding: 0; margin: 8px 0; } .legend li { display: flex; gap: 6px; align-items: center; }
.two { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 4px 32px; }
ul.fusions { list-style: none; padding: 0; margin: 0; } ul.fusions li { padding: 3px 0 3px 22px;
  text-indent: -22px; overflow-wrap: anywhere; }
ul.fusions li::before { content: attr(data-mark); display: inline-block; width: 22px;
  text-indent: 0; font-weight: 700; color: var(--k2); }
ul.fusions li.left::before { color: var(--k1); }
.names ul, #quantized ul { columns: 320px; font-size: 13px; padding-left: 18px; margin: 6px 0; }
.names li { overflow-wrap: anywhere; }
.roof { display: grid; grid-template-columns: minmax(0, 620px) minmax(0, 1fr); gap: 8px 28px; }
.roof ol { list-style: none; padding: 0; margin: 0; font-size: 14px; }
.roof li { padding: 3px 0; overflow-wrap: anywhere; }
svg.roofline { width: 100%; min-width: 470px; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg.graph text { font: 11px ui-monospace, monospace; } svg.graph .op { font-weight: 700;
  fill: var(--k); } svg.graph { display: block; }
.node { fill: var(--page); stroke: var(--k); stroke-width: 1.5; }
.edge { fill: none; stroke: var(--quiet); stroke-width: 1.3; } .tip { fill: var(--quiet); }
svg .tick { fill: var(--quiet); } .grid { stroke: var(--line); fill: none; }
.roof .roof, path.roof { stroke: var(--ink); stroke-width: 2; fill: none; }
svg .roofname { font-weight: 600; } .leader { stroke: var(--quiet); }
.dot { fill: var(--k0); } .label { fill: var(--card); stroke: var(--k0); stroke-width: 1.5; }
svg .number { font-weight: 700; fill: var(--k0); }
.pair { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 16px; }
[hidden] { display: none !important; }
@media (max-width: 1080px) { .pair, .two, .roof { grid-template-columns: minmax(0, 1fr); } }
@media screen and (max-width: 1160px) {
  #quantized, #quantized thead, #quantized tbody, #quantized tbody th { display: block; }
  #quantized thead tr { display: flex; flex-wrap: wrap; gap: 4px 14px; padding-bottom: 8px; }
  #quantized thead th { border: 0; padding: 0; }
  #quantized thead th:not(:has(button)) { display: none; }
  #quantized tbody tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr));
    gap: 4px 14px; border-top: 1px solid var(--line); padding: 10px 0; }
  #quantized tbody tr > * { border: 0; padding: 0; text-align: left; white-space: normal; }
  #quantized tbody th { grid-column: 1 / -1; } #quantized td[data-label="#"] { display: none; }
  #quantized td::before { content: attr(data-label); display: block; color: var(--quiet);
    font-size: 12.5px; }
}
@media screen and (max-width: 760px) {
  .flow, .flow thead, .flow tbody, .flow tbody th { display: block; }
  .flow thead tr { display: flex; flex-wrap: wrap; gap: 4px 14px; padding-bottom: 8px; }
  .flow thead th { border: 0; padding: 0; }
  .flow thead th:not(:has(button)) { display: none; }
  .flow tbody tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr));
    gap: 4px 14px; border-top: 1px solid var(--line); padding: 10px 0; }
  .flow tbody tr > * { border: 0; padding: 0; text-align: left; white-space: normal; }
  .flow tbody th { grid-column: 1 / -1; } .flow td[data-label="#"] { display: none; }
  .flow td::before { content: attr(data-label); display: block; color: var(--quiet);
    font-size: 12.5px; }
  main { padding: 16px 12px 48px; } .card { padding: 12px; } h1 { font-size: 22px; }
  dl { grid-template-columns: minmax(0, 1fr); } dd { margin: 0 0 8px; overflow-wrap: anywhere; }
  .facts { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px 16px; }
  .facts b { font-size: 17px; }
  .strips { grid-template-columns: 1fr; gap: 2px; }
}
@media print {
  :root, :root[data-theme] { color-scheme: light; --page: #fff; }
  body { font-size: 10pt; } main { max-width: none; padding: 0; } h2 { break-after: avoid; }
  nav, .tools, #quantized details, .names, p:has(#filter) { display: none; }
  .card { border-color: #bbb; } .facts, .roof, .pair, tr, li { break-inside: avoid; }
  h4, summary, .strips, .block p, h2 + p { break-after: avoid; }
  .pair, .two { grid-template-columns: 2fr 3fr; }
  details::details-content { content-visibility: visible; display: block; block-size: auto; }
  table { font-size: 8.5pt; } th, td { padding-right: 7px; } .scroll { overflow: visible; }
  #quantized .name { min-width: 150px; } svg.graph { max-width: 100%; height: auto; }
  * { print-color-adjust: exact; }
}
"""

SCRIPT = """
(() => {
  const root = document.documentElement, tools = document.querySelector(".tools");
  const make = (tag, props) => Object.assign(document.createElement(tag), props);
  const dark = () => getComputedStyle(root).colorScheme === "dark" || (!root.dataset.theme
    && matchMedia("(prefers-color-scheme: dark)").matches);
  const theme = make("button", {type: "button", textContent: "Dark or light"});
  theme.onclick = () => { root.dataset.theme = dark() ? "light" : "dark"; };
  const all = make("button", {type: "button", textContent: "Open all"});
  all.onclick = () => {
    const open = all.textContent === "Open all";
    document.querySelectorAll("details").forEach(d => { d.open = open; });
    all.textContent = open ? "Close all" : "Open all";
  };
  tools.append(all, " ", theme);
  tools.hidden = false;

  document.querySelectorAll("table.sorts").forEach(table => {
    const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, i) => {
      const button = make("button", {type: "button", textContent: head.textContent});
      head.replaceChildren(button);
      button.onclick = () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach(h => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const value = row => row.cells[i].dataset.v ?? row.cells[i].textContent;
        const number = [...body.rows].every(row => value(row) !== "" && !isNaN(value(row)));
        [...body.rows].sort((a, b) => {
          const [x, y] = up ? [value(a), value(b)] : [value(b), value(a)];
          return number ? x - y : x.localeCompare(y, undefined, {numeric: true});
        }).forEach(row => body.append(row));
      };
    });
  });

  const rows = [...document.querySelectorAll("#quantized tbody tr")];
  const filter = document.getElementById("filter"), count = document.getElementById("count");
  const show = () => {
    const words = filter.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let left = 0;
    rows.forEach(row => {
      const own = row.textContent.toLowerCase();
      row.hidden = !words.every(word => own.includes(word));
      left += row.hidden ? 0 : +row.dataset.count;
      row.querySelectorAll("li").forEach(item => {
        item.hidden = words.length > 0 && !row.hidden
          && words.some(w => [...row.querySelectorAll("li")].some(o => o.textContent
            .toLowerCase().includes(w)) && !item.textContent.toLowerCase().includes(w));
      });
    });
    count.textContent = words.length ? `${rows.filter(r => !r.hidden).length} rows` : "";
  };
  filter.addEventListener("input", show);
  filter.closest("[hidden]").hidden = false;

  const reveal = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash)
      .slice(1));
    for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    if (target) {
      target.querySelector(":scope > details")?.setAttribute("open", "");
      target.scrollIntoView();
    }
  };
  addEventListener("hashchange", reveal);
  reveal();
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach(d => { d.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach(d => { d.open = false; }));
})();
"""
