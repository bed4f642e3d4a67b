// The page around the viewer: theme, and tables that sort and filter.

const byId = (id) => document.getElementById(id);

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

function startTheme() {
  const root = document.documentElement, button = byId("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Change to ${isDark() ? "light" : "dark"} colours`);
  };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  system.addEventListener("change", show);
  show();
}

function startTable(table) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = (row, column) => {
    const cell = row.cells[column], number = parseFloat(cell.dataset.value ?? cell.textContent);
    return heads[column].classList.contains("n") ? (Number.isNaN(number) ? -Infinity : number) : cell.textContent;
  };
  const sort = (column) => {
    const down = heads[column].getAttribute("aria-sort") !== "descending" && heads[column].classList.contains("n");
    const up = !down && heads[column].getAttribute("aria-sort") !== "ascending";
    const sign = up ? 1 : -1;
    const order = (a, b) => (value(a, column) < value(b, column) ? -sign : value(a, column) > value(b, column) ? sign : 0);
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...[...body.rows].sort(order));
  };
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => sort(column)));

  const filter = () => {
    const work = byId("by-workload").value, baseline = byId("by-baseline").value;
    for (const row of body.rows)
      row.hidden = (work && row.dataset.workload !== work) || row.dataset.baseline !== baseline;
  };
  byId("by-workload").addEventListener("change", filter);
  byId("by-baseline").addEventListener("change", filter);
  filter();
}

startTheme();
if (byId("results")) startTable(byId("results"));
