// The images of a finished job in linked views: slice, crosshair, zoom and grey levels are those of all.
// NiiVue draws; what mouse, fingers and keys do is decided here, since its own listeners know one view only.
import { element, find } from "./elements.js";
import { stackOf } from "./stack.js";
import { number, word } from "./words.js";

const LIMITS = [10, 25, 50, 100, 200, 500, 1000];
const MOST_ZOOM = 12;
// How thick it is, in pixels of the screen, and its gap, in halves of that.
const CROSS = 1.3;
const CROSS_GAP = 14;
// Light blue over black to amber: told apart by eyes without red or green, and 0 as dark as what lies around it.
const COLOURS = {
  difference: { R: [120, 30, 10, 160, 255], G: [200, 100, 10, 95, 195], B: [255, 165, 12, 0, 80], I: [0, 64, 128, 192, 255] },
  lower: { R: [30, 30, 70], G: [110, 110, 155], B: [215, 215, 255], I: [0, 1, 255] },
  higher: { R: [215, 215, 245], G: [110, 110, 155], B: [0, 0, 10], I: [0, 1, 255] },
};
const OPAQUE = [255, 255, 255, 255, 255];
const CLEAR_AT_0 = [0, 255, 255];
const OVER = 0.9;

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/** Shows the images that `told` (view.json) names; `fetched(file)` gives their bytes, `changed(slice)` hears of every
    new slice and `say(text)` speaks to screen readers. Nothing, and null, when they are no longer `wanted()`. */
export async function openViewer(told, { fetched, wanted, changed, say }) {
  const tried = document.createElement("canvas").getContext("webgl2");
  if (!tried) throw new Error(word("no_webgl"));
  tried.getExtension("WEBGL_lose_context")?.loseContext();
  const shown = { ...told.images, ...(told.difference && { difference: told.difference }) };
  const names = Object.keys(shown);
  const hu = names.filter((name) => shown[name].unit === "HU" && name !== "difference");
  // Images in HU share their grey levels; any other has its own. Level and width are those of the main group.
  const groupOf = (name) => (hu.includes(name) ? "HU" : name);
  const mainGroup = groupOf(hu[0] ?? "synthetic");
  const windows = Object.fromEntries(names.map((name) => [groupOf(name), [...shown[name].window]]));
  const first = structuredClone(windows);
  const last = told.slices.length - 1;
  const views = {};
  const at = { vox: [0, 0, Math.floor(last / 2)], zoom: 1, pan: [0, 0, 0] };
  let overlay = null;
  let cross = true;
  const stopped = new AbortController();
  const listen = (target, kind, act, options = {}) =>
    target.addEventListener(kind, act, { signal: stopped.signal, ...options });

  const stacks = {};
  for (const name of Object.keys(told.images)) stacks[name] = await stackOf(await fetched(told.images[name].file));
  if (!wanted()) return null;
  const { size } = stacks.synthetic;
  at.vox = [Math.floor(size[0] / 2), Math.floor(size[1] / 2), at.vox[2]];
  const difference = new Int16Array(size[0] * size[1]);
  const frame = find("#viewer .views");
  frame.replaceChildren(...names.map(figure));

  function figure(name) {
    const canvas = element("canvas", { "aria-hidden": "true" });
    const screen = element("div", { class: "screen", tabindex: "0", role: "application" }, canvas);
    if (name === "synthetic") screen.append(element("span", { class: "badge", "data-word": "badge", "aria-hidden": "true" }));
    const caption = element("figcaption", {}, element("b"), element("output"));
    views[name] = { screen, canvas, caption };
    return element("figure", { class: "view", "data-name": name }, screen, caption);
  }

  for (const name of names) {
    const view = views[name];
    view.drawn = new niivue.Niivue({
      backColor: [0, 0, 0, 1],
      crosshairColor: [0.94, 0.89, 0.26, 0.8],
      crosshairGap: CROSS_GAP,
      dragAndDropEnabled: false,
      // Letters at the edges only where the sides of the patient are known.
      fontColor: told.oriented ? [0.75, 0.75, 0.75, 1] : [0, 0, 0, 0],
      isRadiologicalConvention: true,
      loadingText: "",
      logLevel: "error",
      sliceType: 0, // axial
    });
    for (const [colours, map] of Object.entries(COLOURS)) {
      view.drawn.addColormap(colours, { ...map, A: colours === "difference" ? OPAQUE : CLEAR_AT_0 });
    }
    for (const kind of ["mousedown", "mousemove", "mouseup", "touchstart", "touchmove", "touchend", "keyup"]) {
      listen(view.screen, kind, (event) => event.stopPropagation(), { capture: true });
    }
    await view.drawn.attachToCanvas(view.canvas);
    view.canvas.removeAttribute("tabindex");
    const [cal_min, cal_max] = windows[groupOf(name)];
    view.volume = await niivue.NVImage.loadFromUrl({
      url: (stacks[name] ?? stacks.synthetic).plane(),
      name: `${name}.nii`,
      colormap: name === "difference" ? "difference" : "gray",
      cal_min,
      cal_max,
    });
    view.drawn.addVolume(view.volume);
  }

  // What is shown.

  const value = (name) => views[name].volume.getValue(at.vox[0], at.vox[1], 0);
  const unit = (name) => word(`unit_${shown[name].unit}`);
  const signed = (name) => {
    const here = value(name);
    const places = shown[name].unit === "arbitrary" && Math.abs(here) < 100 ? 3 : 0;
    return `${name === "difference" && Math.round(here) > 0 ? "+" : ""}${number(here, places)} ${unit(name)}`.trim();
  };
  const place = () =>
    word("place", { slice: number(at.vox[2] + 1), of: number(last + 1), mm: number(told.positions_mm[at.vox[2]], 1) });

  /** A crosshair as thin at every zoom; NiiVue counts its width in voxels. */
  function setCross({ drawn, canvas }) {
    const { pixDims } = drawn.volumes[0].hdr;
    const mm = Math.max((size[0] * pixDims[1]) / canvas.clientWidth, (size[1] * pixDims[2]) / canvas.clientHeight) / at.zoom;
    drawn.opts.crosshairWidth = cross ? (CROSS * mm) / Math.min(...pixDims.slice(1, 4)) : 0;
    if (drawn.crosshairs3D) drawn.crosshairs3D.mm = [NaN, NaN, NaN]; // made anew
  }

  /** Gives the slice at hand to all views. */
  function load() {
    const source = stacks.source.slice(at.vox[2]);
    const synthetic = stacks.synthetic.slice(at.vox[2]);
    if (views.difference) {
      for (let i = 0; i < difference.length; i++) difference[i] = clamp(synthetic[i] - source[i], -32768, 32767);
      if (overlay) fade();
    }
    for (const [name, values] of Object.entries({ source, synthetic, difference })) {
      views[name]?.volume.img.set(values);
      views[name]?.drawn.updateGLVolume();
    }
  }

  function draw() {
    for (const name of names) {
      const { drawn, caption } = views[name];
      setCross(views[name]);
      drawn.scene.crosshairPos = drawn.vox2frac([at.vox[0], at.vox[1], 0]);
      drawn.scene.pan2Dxyzmm = [...at.pan, at.zoom];
      drawn.drawScene();
      caption.lastChild.textContent = signed(name);
    }
    const slider = find("#slice");
    slider.value = at.vox[2];
    slider.setAttribute("aria-valuetext", place());
    find("#where").textContent = place();
  }

  let speaking = 0;
  function speak() {
    clearTimeout(speaking);
    speaking = setTimeout(() => {
      say(`${place()}. ${names.map((name) => `${word(name)} ${signed(name)}`).join(", ")}`);
    }, 500);
  }

  function go(vox) {
    const slice = at.vox[2];
    at.vox = vox.map((value, axis) => clamp(Math.round(value), 0, size[axis] - 1));
    if (at.vox[2] !== slice) load();
    draw();
    if (at.vox[2] !== slice) changed(at.vox[2]);
  }
  const step = (slices) => go([at.vox[0], at.vox[1], at.vox[2] + slices]);

  function setWindow(group, low, high) {
    windows[group] = [low, high];
    for (const name of names.filter((name) => groupOf(name) === group)) {
      views[name].volume.cal_min = low;
      views[name].volume.cal_max = high;
      views[name].drawn.updateGLVolume();
    }
    if (group === mainGroup) showWindow();
  }

  function showWindow() {
    const [low, high] = windows[mainGroup];
    const fine = high - low < 50 && mainGroup !== "HU";
    const written = (value) => (fine ? Number(value.toPrecision(4)) : Math.round(value));
    find("#level").value = written((low + high) / 2);
    find("#width").value = written(high - low);
    find("#level").step = find("#width").step = fine ? "any" : 10;
    for (const radio of document.querySelectorAll('[name="window"]')) {
      const [from, to] = presets[radio.value];
      radio.checked = Math.abs(from - low) + Math.abs(to - high) < 1e-6 * (to - from);
    }
  }

  function zoomTo(zoom) {
    zoom = clamp(zoom, 1, MOST_ZOOM);
    // The crosshair stays where it is.
    const mm = views.synthetic.drawn.frac2mm(views.synthetic.drawn.scene.crosshairPos);
    at.pan = zoom === 1 ? [0, 0, 0] : at.pan.map((value, axis) => value + (at.zoom - zoom) * mm[axis]);
    at.zoom = zoom;
    draw();
  }

  function setLimit(limit) {
    windows.difference = [-limit, limit];
    find("#limit").value = limit;
    find(".scale .low").textContent = `${number(-limit)} ${unit("difference")} (${word("lower")})`;
    find(".scale .high").textContent = `+${number(limit)} ${unit("difference")} (${word("higher")})`;
    const { volume, drawn } = views.difference;
    [volume.cal_min, volume.cal_max] = windows.difference;
    drawn.updateGLVolume();
    if (!overlay) return;
    fade();
    views.synthetic.drawn.updateGLVolume();
  }

  /** The overlay from clear at 0 to opaque at the limit. Beyond that its values are cut, or they would be over-opaque;
      roots, since NiiVue squares them. */
  function fade() {
    const limit = windows.difference[1];
    for (let i = 0; i < difference.length; i++) {
      overlay.img[i] = Math.sign(difference[i]) * Math.min(limit, Math.sqrt(Math.abs(difference[i]) * limit));
    }
    overlay.alphaThreshold = true;
    overlay.colormapNegative = "lower";
    overlay.cal_max = limit;
    overlay.cal_min = 0.999 * limit;
    overlay.cal_minNeg = -limit;
    overlay.cal_maxNeg = -0.999 * limit;
  }

  /** The difference in a view of its own, over the synthetic image, or nowhere. */
  function showDifference(where) {
    const { drawn } = views.synthetic;
    views.difference.screen.parentElement.hidden = where !== "beside";
    for (const part of [find(".scale"), find("#limit").parentElement]) part.hidden = where === "off";
    if (where === "over" && !overlay) {
      overlay = views.difference.volume.clone();
      overlay.img = overlay.img.slice();
      overlay.colormap = "higher";
      overlay.opacity = OVER;
      fade();
      drawn.addVolume(overlay);
    } else if (where !== "over" && overlay) {
      drawn.removeVolume(overlay);
      overlay = null;
    }
    draw();
  }

  function showCross(wanted) {
    find("#cross").setAttribute("aria-pressed", wanted);
    cross = wanted;
    draw();
  }

  // Controls.

  const presets = hu.length ? told.windows : { full: first[mainGroup] };
  find("#windows").replaceChildren(
    ...Object.keys(presets).map((name) => {
      const radio = element("input", { type: "radio", name: "window", value: name });
      return element("label", {}, radio, element("span", { "data-word": `window_${name}` }));
    }),
  );
  const slider = find("#slice");
  slider.max = last;
  find("#viewer .place").hidden = last === 0;
  find("#viewer .colours").hidden = !views.difference;
  const where = matchMedia("(max-width: 800px)").matches ? "off" : "beside";
  find(`#difference [value=${where}]`).checked = true;
  find("#limit").replaceChildren(...LIMITS.map((limit) => element("option", { value: limit }, `±${number(limit)}`)));

  listen(find("#windows"), "change", (event) => setWindow(mainGroup, ...presets[event.target.value]));
  for (const input of [find("#level"), find("#width")]) {
    listen(input, "change", () => {
      const [level, width] = [find("#level").valueAsNumber, find("#width").valueAsNumber];
      if (Number.isFinite(level) && width > 0) setWindow(mainGroup, level - width / 2, level + width / 2);
      else showWindow();
    });
  }
  listen(slider, "input", () => step(Number(slider.value) - at.vox[2]));
  listen(find("#viewer .place"), "click", (event) => event.target.dataset.step && step(Number(event.target.dataset.step)));
  listen(find("#viewer .zoom"), "click", (event) => {
    const how = event.target.dataset.zoom;
    if (how) zoomTo(how === "reset" ? 1 : at.zoom * (how === "in" ? 1.25 : 0.8));
  });
  listen(find("#cross"), "click", () => showCross(find("#cross").getAttribute("aria-pressed") !== "true"));
  if (views.difference) {
    listen(find("#difference"), "change", (event) => showDifference(event.target.value));
    listen(find("#limit"), "change", (event) => setLimit(Number(event.target.value)));
  }

  for (const name of names) {
    const { screen, canvas, drawn } = views[name];
    const fracAt = (event) => {
      const box = canvas.getBoundingClientRect();
      const ratio = drawn.uiData.dpr ?? 1;
      const frac = drawn.canvasPos2frac([(event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio]);
      return frac[0] < 0 ? null : frac;
    };
    let drag = null;
    const point = (event) => {
      const frac = fracAt(event);
      if (!frac) return;
      const [x, y] = drawn.frac2vox(frac);
      go([x, y, at.vox[2]]);
    };
    listen(screen, "pointerdown", (event) => {
      const kind = event.button === 2 ? "window" : event.button === 1 || event.shiftKey ? "pan" : "point";
      drag = { kind, x: event.clientX, y: event.clientY, window: windows[groupOf(name)], frac: fracAt(event), pan: at.pan };
      screen.setPointerCapture(event.pointerId);
      screen.focus({ preventScroll: true });
      if (kind === "point") point(event);
      if (event.pointerType === "mouse") event.preventDefault();
    });
    listen(screen, "pointermove", (event) => {
      if (!drag) return;
      if (drag.kind === "point") point(event);
      if (drag.kind === "window") windowBy(name, drag.window, event.clientX - drag.x, event.clientY - drag.y);
      const frac = drag.kind === "pan" && drag.frac ? fracAt(event) : null;
      if (frac) {
        const [from, to] = [drag.frac, frac].map((place) => drawn.frac2mm(place));
        // What lies under the pointer is counted from where the image lies now.
        at.pan = at.pan.map((value, axis) => value + at.zoom * (to[axis] - from[axis]));
        at.pan[2] = 0;
        draw();
        drag.frac = fracAt(event) ?? drag.frac;
      }
    });
    for (const end of ["pointerup", "pointercancel"]) listen(screen, end, () => (drag = null));
    for (const kind of ["contextmenu", "dblclick"]) {
      listen(screen, kind, (event) => (event.preventDefault(), event.stopPropagation()), { capture: true });
    }
    listen(screen, "dblclick", () => zoomTo(1));
    let turned = 0;
    listen(screen, "wheel", (event) => {
      event.preventDefault();
      event.stopPropagation();
      if (event.ctrlKey) return zoomTo(at.zoom * Math.exp(-event.deltaY / 300));
      // A notch of a wheel is a slice; a touchpad sends many small turns.
      turned += event.deltaMode ? event.deltaY * 40 : event.deltaY;
      const slices = Math.trunc(turned / 40);
      if (slices) step(clamp(slices, -1, 1));
      if (slices) turned = 0;
    }, { capture: true, passive: false });
    listen(screen, "keydown", (event) => onKey(event, name), { capture: true });
  }

  /** Grey levels of an image moved by so many pixels: to the right wider, downwards darker. */
  function windowBy(name, [low, high], right, down) {
    const [from, to] = first[groupOf(name)];
    const unit = (to - from) / 300;
    const width = Math.max(unit, high - low + right * unit);
    const level = (low + high) / 2 + down * unit;
    if (name === "difference") return;
    setWindow(groupOf(name), level - width / 2, level + width / 2);
  }

  function onKey(event, name) {
    event.stopPropagation();
    if (event.altKey || event.metaKey || event.ctrlKey) return;
    const [x, y, z] = at.vox;
    const moved = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    const preset = Object.keys(presets)[Number(event.key) - 1];
    if (moved && event.shiftKey) windowBy(name, windows[groupOf(name)], -10 * moved[0], -10 * moved[1]);
    else if (moved) go([x + moved[0], y + moved[1], z]);
    else if (event.key === "PageUp") step(1);
    else if (event.key === "PageDown") step(-1);
    else if (event.key === "Home") step(-last);
    else if (event.key === "End") step(last);
    else if (event.key === "+" || event.key === "=") zoomTo(at.zoom * 1.25);
    else if (event.key === "-") zoomTo(at.zoom * 0.8);
    else if (event.key === "0") zoomTo(1);
    else if (event.key === "d" && views.difference) (find("label:has(:checked) + label input", find("#difference")) ?? find("#difference input")).click();
    else if (event.key === "x") find("#cross").click();
    else if (preset) setWindow(mainGroup, ...presets[preset]);
    else return;
    event.preventDefault();
    speak();
  }

  /** All words and numbers once more, in the language that is chosen now. */
  function relabel() {
    for (const name of names) {
      views[name].caption.firstChild.textContent = word(name);
      views[name].screen.setAttribute("aria-label", word("view_label", { name: word(name) }));
      views[name].screen.setAttribute("aria-roledescription", word("view_role"));
    }
    if (views.difference) setLimit(windows.difference[1]);
    showWindow();
    draw();
  }
  load();
  relabel();
  showCross(true);
  if (views.difference) showDifference(where);
  changed(at.vox[2]);

  return {
    relabel,
    close() {
      stopped.abort();
      clearTimeout(speaking);
      for (const { drawn, screen } of Object.values(views)) {
        drawn.resizeObserver?.disconnect();
        drawn.gl?.getExtension("WEBGL_lose_context")?.loseContext();
        screen.parentElement.remove();
      }
    },
  };
}
