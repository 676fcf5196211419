"use strict";
for (const box of document.querySelectorAll("[data-table]")) {
  const limit = Number(box.dataset.limit);
  const all = JSON.parse(box.querySelector("script").textContent);
  const body = box.querySelector("tbody");
  const status = box.querySelector("[role=status]");
  const search = box.querySelector("input");
  const heads = [...box.querySelectorAll("th")];
  const digits = heads.map((head) => head.dataset.digits);
  let column = 0;
  let sign = 1;

  const shown = (value, place) => {
    if (value === null) return "–";
    return digits[place] === undefined ? value : value.toFixed(Number(digits[place]));
  };
  const compare = (one, other) => {
    const [a, b] = [one[column], other[column]];
    if (a === null || b === null) return (a === null) - (b === null); // no value: last, either way
    return sign * ((a > b) - (a < b)) || one[0] - other[0];
  };
  // A word that begins a user's number or a text: 12 finds 12 and 120, harm finds who is harmed.
  const matches = (row, words) => {
    const cells = row.filter((_, place) => place === 0 || digits[place] === undefined).map(String);
    return words.every((word) => cells.some((cell) => cell.startsWith(word)));
  };

  const draw = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = all.filter((row) => matches(row, words)).sort(compare);
    const rows = found.slice(0, limit).map((row) => {
      const line = document.createElement("tr");
      row.forEach((value, place) => {
        const cell = line.insertCell();
        cell.textContent = shown(value, place);
        if (digits[place] === undefined) cell.className = "text";
      });
      return line;
    });
    body.replaceChildren(...rows);
    heads.forEach((head, place) => {
      head.setAttribute("aria-sort", place !== column ? "none" : sign > 0 ? "ascending" : "descending");
    });
    const cut = found.length > limit ? `, of which the first ${limit} in this order are shown` : "";
    status.textContent = `${found.length} of ${all.length} users${cut}.`;
  };

  heads.forEach((head, place) => {
    head.querySelector("button").addEventListener("click", () => {
      sign = place === column ? -sign : 1;
      column = place;
      draw();
    });
  });
  search.addEventListener("input", draw);
  draw();
}
