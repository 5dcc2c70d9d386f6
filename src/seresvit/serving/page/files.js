// The files in what a person drops or chooses.

export const MOST_FILES = 20_000;
const HIDDEN = /(^|\/)(\..*|__MACOSX\/.*|Thumbs\.db|desktop\.ini)$/i;

/** All files of dropped folders, to their depths, as { path, file }. */
export async function filesIn(items) {
  const entries = [...items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const found = [];
  async function walk(entry) {
    if (found.length > MOST_FILES) return;
    const path = entry.fullPath.slice(1);
    if (entry.isFile) {
      found.push({ path, file: await new Promise((resolve, reject) => entry.file(resolve, reject)) });
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      // A reader gives a hundred at a time.
      const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!some.length) return;
      for (const one of some) await walk(one);
    }
  }
  for (const entry of entries) await walk(entry);
  return found;
}

/** The files of an input. */
export const listed = (input) => [...input.files].map((file) => ({ file, path: file.webkitRelativePath || file.name }));

/** Without what systems leave in folders, in the order of their names. */
export function tidied(found) {
  const seen = found.filter(({ path }) => !HIDDEN.test(path));
  return seen.sort((a, b) => a.path.localeCompare(b.path, "en", { numeric: true }));
}
