// The confusion matrix: what a cell says under the pointer or the arrow keys, and three more orders of its classes.
for (const box of document.querySelectorAll(".matrix")) {
  const table = box.querySelector("table");
  const head = table.tHead.rows[0], body = table.tBodies[0];
  const tip = box.querySelector(".tip"), controls = box.querySelector(".controls");
  const rows = [...body.rows].map((row, index) => ({
    index, row, name: row.dataset.name, size: +row.dataset.n, wrong: +row.dataset.wrong, cells: [...row.cells], column: head.cells[index + 1],
  }));
  const others = head.cells[rows.length + 1]; // where only the most confused classes are shown
  const rate = (one) => (one.size ? one.wrong / one.size : 0);
  const orders = {
    data: (a, b) => a.index - b.index,
    name: (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }) || a.index - b.index,
    error: (a, b) => rate(b) - rate(a) || b.wrong - a.wrong || a.index - b.index,
    size: (a, b) => b.size - a.size || a.index - b.index,
  };
  let shown = rows, cursor = null;

  const sort = (by) => {
    shown = [...rows].sort(orders[by]);
    head.append(...shown.map((one) => one.column), ...(others ? [others] : []));
    for (const one of rows) one.row.append(...shown.map((other) => one.cells[other.index + 1]), ...(others ? [one.cells.at(-1)] : []));
    body.append(...shown.map((one) => one.row));
    for (const button of controls.querySelectorAll("button")) button.setAttribute("aria-pressed", button.dataset.by === by);
    leave();
  };

  const leave = () => {
    for (const marked of table.querySelectorAll(".at, .cursor")) marked.classList.remove("at", "cursor");
    tip.hidden = true;
    cursor = null;
  };

  const point = (cell) => {
    const row = cell.parentElement, place = cell.cellIndex, { name, n } = row.dataset;
    const answer = head.cells[place].title, count = +cell.textContent;
    leave();
    cursor = cell;
    cell.classList.add("cursor");
    row.cells[0].classList.add("at");
    head.cells[place].classList.add("at");
    const share = +n ? ` (${((100 * count) / n).toFixed(1)}\u202f%)` : "";
    const what = document.createElement("b");
    what.textContent = name === answer ? `${name}: correct` : `${name} predicted as ${answer}`;
    const figures = document.createElement("span");
    figures.textContent = `${count} of ${n}${share}`;
    tip.replaceChildren(what, figures);
    tip.hidden = false;
    const at = cell.getBoundingClientRect(), from = box.getBoundingClientRect();
    const left = Math.min(Math.max(at.left + at.width / 2 - from.left - tip.offsetWidth / 2, 0), from.width - tip.offsetWidth);
    const above = at.top - from.top - tip.offsetHeight - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${at.top > tip.offsetHeight + 12 ? above : at.bottom - from.top + 8}px`;
  };

  for (const cell of body.querySelectorAll("td[title]")) cell.removeAttribute("title"); // the tip says it instead
  body.addEventListener("pointerover", (event) => {
    const cell = event.target.closest("td");
    if (cell) point(cell);
    else leave();
  });
  table.addEventListener("pointerleave", leave);
  table.addEventListener("blur", leave);
  table.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Escape") leave();
    if (!step) return;
    event.preventDefault();
    const row = cursor ? body.rows[cursor.parentElement.sectionRowIndex + step[0]] : body.rows[0];
    const cell = row && row.cells[cursor ? cursor.cellIndex + step[1] : 1];
    if (cell && cell.tagName === "TD") point(cell);
  });
  controls.addEventListener("click", (event) => event.target.dataset.by && sort(event.target.dataset.by));
  controls.hidden = false;
  table.tabIndex = 0;
}

// On paper everything is open.
addEventListener("beforeprint", () => {
  for (const closed of document.querySelectorAll("details:not([open])")) {
    closed.open = true;
    addEventListener("afterprint", () => (closed.open = false), { once: true });
  }
});
