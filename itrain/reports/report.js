"use strict";
const tip = document.getElementById("tip");
const chosen = document.getElementById("chosen");
const commandOf = (fit) => document.querySelector(`#fit-${fit} code`).textContent;

// --- the figures of a cell, while it is pointed at or has the focus

function show(cell) {
  tip.textContent = `${cell.dataset.name}\n${cell.dataset.details}`;
  tip.hidden = false;
  const place = cell.getBoundingClientRect();
  const left = Math.min(place.left, innerWidth - tip.offsetWidth - 8);
  const above = place.top - tip.offsetHeight - 6;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above > 0 ? above : place.bottom + 6}px`;
}
const hide = () => { tip.hidden = true; };

// --- its commands, when it is chosen

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Where a browser keeps its clipboard from pages on disk, the text can still be selected and copied.
    getSelection().selectAllChildren(chosen.querySelector("pre"));
    return document.execCommand("copy");
  }
}

async function choose(cell) {
  document.querySelectorAll(".heat [aria-pressed]").forEach((other) => other.removeAttribute("aria-pressed"));
  cell.setAttribute("aria-pressed", "true");
  const fits = cell.dataset.fits.split(" ");
  const commands = fits.map(commandOf).join("\n");
  chosen.querySelector("h2").textContent = cell.dataset.name;
  chosen.querySelector(".details").textContent = cell.dataset.details.replaceAll("\n", "; ");
  chosen.querySelector("pre").textContent = commands;
  chosen.querySelector(".links").replaceChildren(...fits.flatMap((fit) => {
    const link = document.createElement("a");
    link.href = `#fit-${fit}`;
    link.textContent = "its row in the table";
    return [link, " "];
  }));
  chosen.hidden = false;
  hide();
  const done = await copy(commands);
  chosen.querySelector(".copied").textContent = done ? "Copied:" : "The command, to be copied by hand:";
}

function close() {
  chosen.hidden = true;
  document.querySelectorAll(".heat [aria-pressed]").forEach((cell) => cell.removeAttribute("aria-pressed"));
}
chosen.querySelector(".close").addEventListener("click", close);
addEventListener("keydown", (event) => { if (event.key === "Escape") { hide(); close(); } });
addEventListener("scroll", hide, { passive: true, capture: true });

// --- each heat map is one stop of the tab key; arrows move in it

for (const map of document.querySelectorAll(".heat")) {
  const rows = [...map.tBodies[0].rows].map((row) => [...row.cells].slice(1).map((cell) => cell.firstElementChild));
  const cells = rows.flat().filter(Boolean);
  const enter = (cell) => cells.forEach((other) => { other.tabIndex = other === cell ? 0 : -1; });
  enter(cells[0]);
  cells.forEach((cell) => {
    cell.addEventListener("mouseenter", () => show(cell));
    cell.addEventListener("mouseleave", hide);
    cell.addEventListener("focus", () => { enter(cell); show(cell); });
    cell.addEventListener("blur", hide);
    cell.addEventListener("click", () => choose(cell));
  });
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  map.addEventListener("keydown", (event) => {
    if (!(event.key in steps)) return;
    event.preventDefault();
    const [down, right] = steps[event.key];
    const row = rows.findIndex((each) => each.includes(event.target));
    const next = rows[row + down]?.[rows[row].indexOf(event.target) + right];
    if (next) next.focus();
  });
}

// --- a heading sorts, numbers as numbers, what is empty always last

for (const table of document.querySelectorAll(".sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const falling = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const text = (row) => row.cells[column].textContent;
    const order = (a, b) => a.localeCompare(b, "en", { numeric: true });
    const numeric = [...table.tBodies[0].rows].every((row) => !Number.isNaN(Number(text(row))));
    const compare = numeric ? (a, b) => Number(a) - Number(b) : order;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      if (!text(a) || !text(b)) return Boolean(text(b)) - Boolean(text(a));
      return compare(text(a), text(b)) * (falling ? -1 : 1);
    });
    table.tBodies[0].append(...rows);
  }));
}
