"use strict";
// Tables sort by the column whose head is pressed; numbers as numbers, and what has none at the end.
function value(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value !== undefined ? cell.dataset.value : cell.textContent.trim();
}
function compare(a, b) {
  const x = parseFloat(a), y = parseFloat(b);
  const noX = a === "", noY = b === "";
  if (noX || noY) return noX - noY || 0;
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
}
for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = table.tBodies[0];
    const rows = [...body.rows];
    rows.sort((a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      return x === "" || y === "" ? compare(x, y) : (up ? 1 : -1) * compare(x, y);
    });
    body.append(...rows);
    if (table.id === "edits") show();
  }));
}
// The list of edits: those that fit what is chosen, some at a time.
const STEP = 100;
let most = STEP;
const edits = document.getElementById("edits");
const filters = [...document.querySelectorAll(".filters [name]")];
function show() {
  if (!edits) return;
  const wanted = Object.fromEntries(filters.map((filter) => [filter.name, filter.value.toLowerCase()]));
  let fitting = 0;
  for (const row of edits.tBodies[0].rows) {
    const fits = ["method", "dataset", "protocol"].every((name) => !wanted[name] || row.dataset[name].toLowerCase() === wanted[name])
      && (!wanted.text || row.textContent.toLowerCase().includes(wanted.text));
    fitting += fits;
    row.hidden = !fits || fitting > most;
  }
  document.getElementById("count").textContent = `${Math.min(fitting, most)} of ${fitting}`;
  document.getElementById("more").hidden = fitting <= most;
}
filters.forEach((filter) => filter.addEventListener("input", () => { most = STEP; show(); }));
document.getElementById("more")?.addEventListener("click", () => { most += STEP; show(); });
show();
