// The page: images in, progress, views, downloads. The address after # is the job, so that a reload returns to it.
import { all, element, find } from "./elements.js";
import { filesIn, listed, MOST_FILES, tidied } from "./files.js";
import { drawGates, drawShares } from "./gates.js";
import { asCalled, ask, askToken, upload } from "./server.js";
import { openViewer } from "./viewer.js";
import { bytes, loadWords, named, number, setLanguage, time, translate, translated, word } from "./words.js";

let models = [];
let chosen = [];
let screen = { name: "" };
let viewer = null;
let timer = 0;
let pace = null;
let spoken = "";

const say = (text) => (find("#told").textContent = text);

function speak(language) {
  setLanguage(language);
  for (const button of all("[data-language]")) button.setAttribute("aria-pressed", button.dataset.language === language);
  const list = find("#viewer .keys dl");
  list.replaceChildren(...word("keys_list").flatMap(([keys, does]) => [element("dt", {}, keys), element("dd", {}, does)]));
  drawModels();
  drawChosen();
  render();
  translate();
  viewer?.relabel();
}

// What is given.

function choose(found) {
  const seen = tidied(found);
  const key = seen.length > MOST_FILES ? "too_many" : found.length && !seen.length ? "none_found" : "";
  chosen = key ? [] : seen;
  refuse(key, { count: number(MOST_FILES) });
  drawChosen();
  if (chosen.length) {
    say(find("#chosen .what").textContent);
    find("#start [type=submit]").focus();
  }
}

const refuse = (key, values) => (find("#refused").textContent = key && word(key, values));

function drawChosen() {
  const size = bytes(chosen.reduce((sum, { file }) => sum + file.size, 0));
  const key = chosen.length === 1 ? "chosen_one" : "chosen";
  find("#chosen").hidden = !chosen.length;
  find("#chosen .what").textContent = chosen.length ? word(key, { count: number(chosen.length), size }) : "";
  find("#drop").classList.toggle("filled", chosen.length > 0);
}

function drawModels() {
  const before = find("[name=model]:checked")?.value;
  find("#models .choices").replaceChildren(
    ...models.map((model) => {
      const radio = element("input", { type: "radio", name: "model", value: model.name });
      radio.checked = model.name === (before ?? models[0].name);
      const sources = (model.sources ?? []).join(", ");
      const what = [word(sources ? "model_from" : "model_target", { sources: named(sources), target: named(model.target || "?") })];
      if (model.context_slices) what.push(word("model_context", { count: number(2 * model.context_slices + 1) }));
      return element("label", {}, radio, element("span", {}, element("b", {}, model.name), element("small", {}, what.join(" · "))));
    }),
  );
}

// One screen after another.

/** Shows another screen, or the same with other contents; a heading that is new gets the focus. */
function show(next) {
  const moved = next.name !== screen.name;
  if (moved && viewer) {
    viewer.close();
    viewer = null;
    delete find("#viewer").dataset.ready;
  }
  screen = next;
  render();
  if (!moved) return;
  for (const section of all("main > section")) section.hidden = section.id !== screen.name;
  find(`#${screen.name} h1`).focus({ preventScroll: true });
  scrollTo(0, 0);
}

function render() {
  ({ work: renderWork, failed: renderFailed, result: renderResult })[screen.name]?.();
  const title = find(`#${screen.name || "start"} h1`).textContent;
  document.title = title ? `${title} · SE-ResViT` : "SE-ResViT";
}

function put(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

function renderWork() {
  const { phase, done, total, position } = screen;
  const bar = find("#work progress");
  const step = { check: "upload", start: "queued" }[phase] ?? phase;
  const steps = ["upload", "queued", "running", "done"];
  for (const item of all("#work .steps li")) {
    const place = Math.sign(steps.indexOf(item.dataset.step) - steps.indexOf(step));
    item.className = { "-1": "past", 0: "now", 1: "" }[place];
    if (place) item.removeAttribute("aria-current");
    else item.setAttribute("aria-current", "step");
  }
  const detail = {
    upload: () => word("uploaded", { done: bytes(done), total: bytes(total) }),
    queued: () => word(["next", "before_one"][position] ?? "before", { count: number(position) }),
    running: () => {
      if (done >= total) return word("preparing");
      return [word("slices_done", { done: number(done), total: number(total) }), left(done, total)].filter(Boolean).join(", ");
    },
  }[phase];
  put(find("#work h1"), word(`working_${phase}`));
  put(find("#work .detail"), detail && (total || phase === "queued") ? detail() : "");
  // Screen readers hear of every step, and of every quarter of it.
  const mark = `${phase} ${total ? Math.floor((4 * done) / total) : ""}`;
  if (mark !== spoken) say([word(`working_${phase}`), find("#work .detail").textContent].filter(Boolean).join(". "));
  spoken = mark;
  if (total && phase !== "queued") bar.value = done / total;
  else bar.removeAttribute("value");
  find("#lost").hidden = !screen.lost;
  put(find("#lost"), screen.lost ? word("lost") : "");
}

/** How long the rest takes at the pace since this page saw the first slice done. */
function left(done, total) {
  const now = performance.now();
  if (!pace || done < pace.done) pace = { done, now };
  if (done <= pace.done || done >= total) return "";
  const seconds = (((now - pace.now) / (done - pace.done)) * (total - done)) / 1000;
  return seconds < 90 ? word("left_s", { count: number(Math.ceil(seconds / 5) * 5) }) : word("left_min", { count: number(seconds / 60) });
}

function renderFailed() {
  put(find("#failed h1"), word("failed_title"));
  put(find("#failed .advice"), word(screen.key));
  find("#failed .trouble").hidden = !screen.detail;
  put(find("#failed .detail"), asCalled(screen.detail ?? "", screen.id));
  find("#retry").hidden = !screen.retry;
}

function fail(trouble, retry) {
  const keys = { 404: "failed_gone", 410: "failed_gone", 413: "failed_large", 429: "failed_full", 503: "failed_full", 0: "failed_net" };
  const key = keys[trouble.status] ?? (trouble.status >= 500 ? "failed_server" : "failed_bad");
  show({ name: "failed", key, detail: trouble.message, retry });
}

async function send() {
  const model = find("[name=model]:checked")?.value;
  if (!chosen.length) {
    refuse("none_chosen");
    return find("#pick-folder").focus();
  }
  const files = chosen;
  const stopped = new AbortController();
  const progress = (done, total) => {
    if (screen.stop === stopped) show({ ...screen, phase: done < total ? "upload" : "check", done, total: done < total ? total : 0 });
  };
  show({ name: "work", phase: "upload", done: 0, total: 0, stop: stopped });
  try {
    const answer = await upload(model, files, progress, stopped.signal);
    choose([]);
    location.hash = answer.id;
  } catch (trouble) {
    if (trouble.status === -1) show({ name: "start" });
    else if (trouble.status === 401) {
      show({ name: "start" });
      await askToken(Boolean(sessionStorage.getItem("token")));
      await send();
    } else fail(trouble, send);
  }
}

async function follow(id) {
  clearTimeout(timer);
  if (id !== location.hash.slice(1)) return;
  let wait = 700;
  try {
    const job = await (await ask(`api/jobs/${id}`)).json();
    if (id !== location.hash.slice(1)) return;
    if (job.state === "done") return openResult(job);
    if (job.state === "failed") return show({ name: "failed", key: "failed_job", detail: job.message, id });
    if (job.state === "cancelled") return show({ name: "failed", key: "failed_cancelled" });
    if (job.state !== "running") pace = null;
    const { done, total, position } = job;
    show({ name: "work", phase: job.state, done, total, position, id });
  } catch (trouble) {
    if (id !== location.hash.slice(1)) return;
    if (trouble.status && trouble.status !== 502 && trouble.status !== 503) return fail(trouble);
    show({ name: "work", phase: "start", ...screen, id, lost: true });
    wait = 3000;
  }
  timer = setTimeout(follow, wait, id);
}

// The result.

async function openResult(job) {
  put(find("#saving"), "");
  show({ name: "result", job });
  undrawn("");
  const retry = () => openResult(job);
  let told = null;
  try {
    told = await (await ask(`api/jobs/${job.id}/view`)).json();
  } catch (trouble) {
    return screen.job === job && fail(trouble, retry);
  }
  if (screen.job !== job) return;
  screen.told = told;
  render();
  const changed = (slice) => {
    screen.slice = slice;
    drawShares(told, slice);
  };
  const fetched = async (file) => (await ask(`api/jobs/${job.id}/view/${file}`)).arrayBuffer();
  try {
    find("#viewer").classList.add("loading");
    const opened = await openViewer(told, { fetched, wanted: () => screen.job === job, changed, say });
    if (screen.job !== job) return opened?.close();
    viewer = opened;
    translate();
    find("#viewer").dataset.ready = "yes";
  } catch (error) {
    if (screen.job === job) undrawn(error.message || word("failed_net"));
  } finally {
    find("#viewer").classList.remove("loading");
  }
}

function undrawn(reason) {
  find("#undrawn").hidden = !reason;
  find("#undrawn").textContent = reason && word("undrawn", { reason });
  for (const part of all("#viewer .controls, #viewer .views, #viewer .place, #viewer .colours, #viewer .keys")) part.hidden = Boolean(reason);
}

function warning(line, job) {
  const [text, lang] = translated(line);
  return element("span", { lang }, asCalled(text, job));
}

function renderResult() {
  const { job, told } = screen;
  put(find("#result h1"), job.target ? word("result_title", { target: named(job.target) }) : word("result_title_bare"));
  const facts = [
    job.model && word("fact_model", { name: job.model }),
    job.num_slices && word(job.num_slices === 1 ? "fact_slices_one" : "fact_slices", { count: number(job.num_slices) }),
    job.finished && word("fact_made", { time: time(job.finished) }),
  ];
  put(find("#result .facts"), facts.filter(Boolean).join(" · "));
  const warnings = job.warnings?.length
    ? job.warnings.map((line) => element("li", { class: "warns" }, element("span", { "aria-hidden": "true" }, "⚠"), warning(line, job.id)))
    : [element("li", {}, word("warnings_none"))];
  find("#warnings ul").replaceChildren(...warnings);
  put(find("#downloads .expires"), job.expires ? word("expires", { time: time(job.expires) }) : "");
  for (const part of all("#gates, #downloads")) part.hidden = !told;
  if (!told) return;
  const formats = told.format === "dicom" ? ["dicom", "nifti"] : told.format === "nifti" ? ["nifti"] : ["native", "nifti"];
  find("#downloads .act").replaceChildren(
    ...formats.map((format) => {
      const button = element("button", { type: "button", class: format === formats[0] ? "main" : "" });
      button.textContent = word(`download_${format}`, { format: told.format === "itk" ? "MHA, NRRD" : told.format.toUpperCase() });
      button.addEventListener("click", () => save(job.id, format));
      return button;
    }),
  );
  const parts = [];
  if (told.averaged > 1) parts.push(word("averaged", { count: told.averaged }));
  if (!told.oriented) parts.push(word("not_axial"));
  if (!told.difference) parts.push(word("no_difference"));
  put(find("#viewer .part"), parts.join(" "));
  find("#viewer .part").hidden = !parts.length;
  drawGates(told, screen.slice ?? 0);
}

async function save(id, format) {
  const line = find("#saving");
  line.textContent = word("saving");
  try {
    const answer = await ask(`api/jobs/${id}/result?format=${format}`);
    const told = answer.headers.get("Content-Disposition")?.match(/filename="?([^";]+)"?/)?.[1];
    const name = told ?? { dicom: "synthetic.zip", nifti: "synthetic.nii.gz" }[format] ?? "synthetic";
    const link = element("a", { href: URL.createObjectURL(await answer.blob()), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    line.textContent = word("saved", { name });
  } catch (trouble) {
    line.textContent = word("unsaved", { reason: trouble.message || word("failed_net") });
  }
}

// Start.

function route() {
  clearTimeout(timer);
  pace = null;
  const id = location.hash.slice(1);
  if (!id) return show({ name: "start" });
  if (!/^[0-9a-f]{32}$/.test(id)) return show({ name: "failed", key: "failed_gone" });
  show({ name: "work", phase: "start", id });
  follow(id);
}

async function loadModels() {
  try {
    models = await (await ask("api/models")).json();
    drawModels();
  } catch (trouble) {
    if (!location.hash) fail(trouble, () => (show({ name: "start" }), loadModels()));
  }
}

function leave() {
  if (location.hash) location.hash = "";
  else route();
}

function connect() {
  for (const button of all("[data-language]")) {
    button.addEventListener("click", () => {
      localStorage.setItem("language", button.dataset.language);
      speak(button.dataset.language);
    });
  }
  for (const [button, input] of [["#pick-folder", "#folder"], ["#pick-files", "#files"]]) {
    find(button).addEventListener("click", () => find(input).click());
    find(input).addEventListener("change", (event) => {
      choose(listed(event.target));
      event.target.value = "";
    });
  }
  let inside = 0;
  const light = () => find("#drop").classList.toggle("over", inside > 0);
  addEventListener("dragenter", () => (inside++, light()));
  addEventListener("dragleave", () => (inside--, light()));
  // A drop beside the frame must not make the browser leave the page.
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", async (event) => {
    event.preventDefault();
    inside = 0;
    light();
    if (screen.name !== "start") return;
    const found = await filesIn(event.dataTransfer.items).catch(() => []);
    choose(found);
    if (!found.length) refuse("none_found");
  });
  find("#start form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  find("#clear").addEventListener("click", () => {
    choose([]);
    find("#pick-folder").focus();
  });
  find("#cancel").addEventListener("click", async () => {
    if (screen.stop) return screen.stop.abort();
    try {
      await ask(`api/jobs/${screen.id}`, { method: "DELETE" });
      follow(screen.id);
    } catch (trouble) {
      fail(trouble, () => follow(location.hash.slice(1)));
    }
  });
  find("#again").addEventListener("click", leave);
  find("#other").addEventListener("click", leave);
  find("#retry").addEventListener("click", () => screen.retry());
  find("#erase").addEventListener("click", () => {
    const dialog = find("#ask-erase");
    dialog.returnValue = "no";
    dialog.showModal();
  });
  find("#ask-erase").addEventListener("close", async (event) => {
    if (event.target.returnValue !== "yes") return;
    try {
      await ask(`api/jobs/${screen.job.id}`, { method: "DELETE" });
      leave();
    } catch (trouble) {
      fail(trouble);
    }
  });
  addEventListener("hashchange", route);
}

async function start() {
  const language = await loadWords();
  connect();
  speak(language);
  route();
  await loadModels();
}

start();
