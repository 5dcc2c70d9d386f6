// The server: asked with its token, and given the images.
import { find } from "./elements.js";
import { word } from "./words.js";

const SUFFIX = /\.(nii\.gz|nii|mha|nrrd|zip|dcm|ima|png|tiff?)$/i;
// What the files that were sent under a number are called here, by job; under "" those that have no job yet.
const called = {};

/** What went wrong: an HTTP status, 0 for no answer, and the server's line. */
export class Trouble extends Error {
  constructor(status, detail = "") {
    super(detail);
    this.status = status;
  }
}

export async function ask(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch {
    throw new Trouble(0);
  }
  if (answer.status === 401) {
    await askToken(Boolean(token));
    return ask(path, options);
  }
  if (!answer.ok) throw new Trouble(answer.status, detailOf(await answer.text()));
  return answer;
}

/** A line of the server about a job with the names that its files have here, as long as the page that sent them is open. */
export const asCalled = (line, job = "") =>
  line.replace(/\b\d{5}(\.[a-z.]*[a-z])?\b/g, (name) => called[job]?.[name] ?? name);

function detailOf(text) {
  try {
    const { detail } = JSON.parse(text);
    return typeof detail === "string" ? detail : JSON.stringify(detail);
  } catch {
    return "";
  }
}

let asking = null;
export function askToken(wrong) {
  const dialog = find("#ask-token");
  asking ??= new Promise((resolve) => {
    find(".trouble", dialog).textContent = wrong ? word("token_wrong") : "";
    find("#token").value = "";
    dialog.showModal();
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    find("form", dialog).onsubmit = () => {
      sessionStorage.setItem("token", find("#token").value.trim());
      asking = null;
      resolve();
    };
  });
  return asking;
}

/** Sends the files, numbered, since their own names may tell the patient; resolves to the answer's JSON. */
export function upload(model, files, progress, signal) {
  const form = new FormData();
  form.append("model", model);
  const names = (called[""] = {});
  files.forEach(({ file, path }, index) => {
    const name = String(index + 1).padStart(5, "0") + (path.match(SUFFIX)?.[0].toLowerCase() ?? "");
    names[name] = path;
    form.append("files", file, name);
  });
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "api/jobs");
    const token = sessionStorage.getItem("token");
    if (token) request.setRequestHeader("Authorization", `Bearer ${token}`);
    request.upload.onprogress = (event) => progress(event.loaded, event.total);
    request.onerror = () => reject(new Trouble(0));
    request.onabort = () => reject(new Trouble(-1));
    request.onload = () => {
      if (request.status < 300) {
        const answer = JSON.parse(request.responseText);
        called[answer.id] = names;
        resolve(answer);
      } else reject(new Trouble(request.status, detailOf(request.responseText)));
    };
    signal.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}
