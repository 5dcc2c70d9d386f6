// The gates: a bar a branch for the slice at hand, and both branches over all slices.
import { all, element, find } from "./elements.js";
import { number, word } from "./words.js";

const title = (block) => block.replace("art_", "ART ");
const share = (value) => number(value, 3);
const LEAST_SPAN = 0.02;
const HARDLY = 0.01;
const SVG = "http://www.w3.org/2000/svg";

export function drawGates(told, slice) {
  const blocks = Object.entries(told.gates ?? {});
  const none = { concat: "gates_none_concat" }[told.fusion] ?? (told.maps ? "gates_none_maps" : "gates_none");
  const key = blocks.length ? "gates_lead" : told.gates ? none : "gates_unknown";
  const lead = find("#gates .note");
  lead.textContent = word(key, { highest: number(told.highest_gate ?? 1), fusion: told.fusion });
  delete lead.dataset.word;
  find("#gates .blocks").replaceChildren(...blocks.map(([block, branches]) => gateFigure(block, branches, told.highest_gate)));
  drawShares(told, slice);
}

function gateFigure(block, branches, highest) {
  const bars = Object.keys(branches).map((branch) => {
    const label = word("share_label", { block: title(block), branch: word(branch) });
    const meter = element("span", { class: "meter", role: "meter", "aria-valuemin": 0, "aria-valuemax": highest, "aria-label": label }, element("i"));
    return element("div", { class: `share ${branch}`, "data-block": block, "data-branch": branch }, element("span", {}, word(branch)), meter, element("output"));
  });
  return element("div", { class: "block" }, element("h3", {}, title(block)), ...bars, ...chart(block, branches));
}

function chart(block, branches) {
  const values = Object.values(branches).flat();
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const count = branches.cnn.length;
  if (count < 2) return [];
  // Gates that hardly move are to look so.
  const span = Math.max(high - low, LEAST_SPAN);
  const middle = (low + high) / 2;
  const svg = document.createElementNS(SVG, "svg");
  const ends = (branch) => [share(Math.min(...branches[branch])), share(Math.max(...branches[branch]))];
  const [[t_low, t_high], [c_low, c_high]] = [ends("transformer"), ends("cnn")];
  const attributes = { viewBox: "0 0 300 64", preserveAspectRatio: "none", role: "img", class: "chart" };
  const ranges = word("over_slices", { t_low, t_high, c_low, c_high });
  attributes["aria-label"] = `${title(block)}. ${ranges}`;
  for (const [name, value] of Object.entries(attributes)) svg.setAttribute(name, value);
  for (const [branch, line] of Object.entries(branches)) {
    const path = document.createElementNS(SVG, "polyline");
    path.setAttribute("class", branch);
    path.setAttribute("points", line.map((y, x) => `${(300 * x) / (count - 1)},${32 - (56 * (y - middle)) / span}`).join(" "));
    svg.append(path);
  }
  const here = document.createElementNS(SVG, "line");
  for (const [name, value] of Object.entries({ class: "here", y1: 0, y2: 64 })) here.setAttribute(name, value);
  svg.append(here);
  const moved = Object.values(branches).map((line) => Math.max(...line) - Math.min(...line));
  const said = Math.max(...moved) < HARDLY ? `${ranges} ${word("hardly")}` : ranges;
  return [svg, element("p", { class: "note" }, said)];
}

/** Sets the bars to those of a slice. */
export function drawShares(told, slice) {
  for (const row of all("#gates .share")) {
    const value = told.gates[row.dataset.block][row.dataset.branch][slice];
    const meter = find(".meter", row);
    meter.setAttribute("aria-valuenow", value.toFixed(3));
    meter.firstChild.style.width = `${(100 * value) / told.highest_gate}%`;
    find("output", row).textContent = share(value);
  }
  const last = Math.max(1, told.slices.length - 1);
  for (const line of all("#gates .here")) for (const x of ["x1", "x2"]) line.setAttribute(x, (300 * slice) / last);
}
