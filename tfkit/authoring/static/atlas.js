// Makes every <table class="atlas"> searchable, sortable and filterable, with nothing from elsewhere.
// A header with data-sort sorts by its column; one with data-filter also gets a menu of the column's values.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.atlas")) {
    const heads = [...table.tHead.rows[0].cells];
    const rows = [...table.tBodies[0].rows];
    const text = (row, column) => row.cells[column].textContent.trim();
    const controls = document.createElement("div");
    controls.className = "atlas-controls";
    const search = Object.assign(document.createElement("input"), { type: "search", placeholder: "search the papers" });
    search.setAttribute("aria-label", "search the papers");
    controls.append(search);
    const menus = [];
    heads.forEach((head, column) => {
      if (!("filter" in head.dataset)) return;
      const menu = document.createElement("select");
      menu.setAttribute("aria-label", "filter by " + head.textContent);
      menu.append(new Option("every " + head.textContent, ""));
      const values = [...new Set(rows.map((row) => text(row, column)))].filter(Boolean).sort();
      for (const value of values) menu.append(new Option(value, value));
      menus.push([menu, column]);
      controls.append(menu);
    });
    const count = document.createElement("span");
    count.setAttribute("role", "status");
    controls.append(count);
    table.before(controls);

    const update = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const all = row.textContent.toLowerCase();
        const fits = words.every((word) => all.includes(word)) &&
          menus.every(([menu, column]) => !menu.value || text(row, column) === menu.value);
        row.hidden = !fits;
        shown += fits;
      }
      count.textContent = shown + " of " + rows.length;
    };
    search.addEventListener("input", update);
    for (const [menu] of menus) menu.addEventListener("change", update);

    heads.forEach((head, column) => {
      if (!("sort" in head.dataset)) return;
      head.tabIndex = 0;
      const sort = () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        rows.sort((a, b) => text(a, column).localeCompare(text(b, column), "en", { numeric: true }) * (down ? -1 : 1));
        table.tBodies[0].append(...rows);
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
    });
    update();
  }
});
