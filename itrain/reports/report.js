"use strict";
const tip = document.getElementById("tip");
const chosen = document.getElementById("chosen");
const commandOf = (fit) => document.querySelector(`#fit-${fit} code`).textContent;

// --- the figures of a cell, point or line, while it is pointed at or has the focus

function show(cell, x, y, others = []) {
  const more = others.length > 8 ? ` and ${others.length - 8} more` : "";
  const beside = others.length ? `\n\nalso here: ${others.slice(0, 8).join("; ")}${more}` : "";
  tip.textContent = `${cell.dataset.name}\n${cell.dataset.details}${beside}`;
  tip.hidden = false;
  const place = cell.getBoundingClientRect();
  const left = Math.min(x ?? place.left, innerWidth - tip.offsetWidth - 8);
  const above = (y ?? place.top) - tip.offsetHeight - 6;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above > 0 ? above : (y ?? place.bottom) + (y === undefined ? 6 : 18)}px`;
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
  document.querySelectorAll("[data-fits][aria-pressed]").forEach((other) => other.removeAttribute("aria-pressed"));
  cell.setAttribute("aria-pressed", "true");
  const fits = cell.dataset.fits.split(" ");
  const commands = fits.map(commandOf).join("\n");
  chosen.querySelector("h2").textContent = cell.dataset.name;
  chosen.querySelector(".details").textContent = cell.dataset.details.replaceAll("\n", "; ");
  chosen.querySelector("pre").textContent = commands;
  chosen.querySelector(".links").replaceChildren(...fits.flatMap((fit) => {
    const link = document.createElement("a");
    link.href = `#fit-${fit}`;
    link.textContent = "row in the table";
    return [link, " "];
  }));
  chosen.hidden = false;
  hide();
  const done = await copy(commands);
  chosen.querySelector(".copied").textContent = done ? "Copied:" : "Copy the command by hand:";
}

function close() {
  chosen.hidden = true;
  document.querySelectorAll("[data-fits][aria-pressed]").forEach((cell) => cell.removeAttribute("aria-pressed"));
}
chosen.querySelector(".close").addEventListener("click", close);
addEventListener("keydown", (event) => { if (event.key === "Escape") { hide(); close(); } });
addEventListener("scroll", hide, { passive: true, capture: true });

// --- each heat map and plot is one stop of the tab key; arrows move in it

const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function roam(box, rows) {
  const cells = rows.flat().filter(Boolean);
  const enter = (cell) => cells.forEach((other) => other.setAttribute("tabindex", other === cell ? 0 : -1));
  enter(cells[0]);
  cells.forEach((cell) => {
    cell.addEventListener("mouseleave", hide);
    cell.addEventListener("focus", () => { enter(cell); show(cell); });
    cell.addEventListener("blur", hide);
    cell.addEventListener("click", () => choose(cell));
  });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.matches(".spot")) choose(event.target);
    if (!(event.key in steps)) return;
    event.preventDefault();
    const [down, right] = steps[event.key];
    const row = rows.findIndex((each) => each.includes(event.target));
    const next = rows[row + down]?.[rows[row].indexOf(event.target) + right];
    if (next) next.focus();
  });
}

for (const map of document.querySelectorAll(".heat")) {
  const rows = [...map.tBodies[0].rows].map((row) => [...row.cells].slice(1).map((cell) => cell.firstElementChild));
  roam(map, rows);
  rows.flat().filter(Boolean).forEach((cell) => cell.addEventListener("mouseenter", () => show(cell)));
}

for (const plot of document.querySelectorAll(".plot svg")) {
  const grouped = [...plot.querySelectorAll("[data-row]")].map((line) => [...line.querySelectorAll(".spot")]);
  // Lines are drawn from the lowest to the highest.
  const lines = [...plot.querySelectorAll(".line")].reverse().map((line) => [line]);
  roam(plot, [...grouped, ...lines]);
  plot.addEventListener("mousemove", (event) => {
    const under = document.elementsFromPoint(event.clientX, event.clientY).map((each) => each.closest(".spot"));
    const [first, ...others] = new Set(under.filter(Boolean));
    const named = others.map((other) => other.dataset.name.replace(`${plot.dataset.title}, `, ""));
    if (first) show(first, event.clientX, event.clientY, named);
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
