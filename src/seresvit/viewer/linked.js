// Views of one case on a page, linked: slice, crosshair and zoom are those of all.
// Reads the JSON in #volumes: views (name, nifti as base64, window, unit), slices, positions_mm, start, oriented, windows.
"use strict";
(async () => {
  const frame = document.getElementById("viewer");
  const told = JSON.parse(document.getElementById("volumes").textContent);
  const slider = frame.querySelector("input");
  const choice = frame.querySelector("select");
  const place = frame.querySelector("output");
  const say = (words) => {
    frame.querySelector(".views").hidden = frame.querySelector(".controls").hidden = true;
    frame.querySelector(".trouble").textContent = words;
  };
  if (!document.createElement("canvas").getContext("webgl2")) {
    return say("This browser offers no WebGL 2, with which the viewer draws. The images above show the same case.");
  }

  const number = (value) => value.toLocaleString("en", { maximumFractionDigits: 2 }).replace("-", "−");
  const views = [];
  // NiiVue's own linking follows the canvas that has the focus only, and the wheel gives none.
  const follow = (leader, { mm, vox }) => {
    for (const view of views.filter((other) => other !== leader)) {
      view.scene.crosshairPos = view.mm2frac(mm, 0, true);
      view.scene.pan2Dxyzmm = [...leader.scene.pan2Dxyzmm];
      view.drawScene();
    }
    const at = Math.round(vox[2]);
    slider.value = at;
    place.textContent = `slice ${told.slices[at]} at ${number(told.positions_mm[at])} mm`;
    told.views.forEach((view, index) => {
      const volume = views[index].volumes[0];
      const value = volume.getValue(...views[index].frac2vox(views[index].scene.crosshairPos).map(Math.round));
      frame.querySelectorAll("figcaption")[index].textContent = `${view.name}: ${number(value)} ${view.unit}`;
    });
  };

  try {
    for (const [index, view] of told.views.entries()) {
      const drawn = new niivue.Niivue({
        backColor: [0, 0, 0, 1],
        crosshairColor: [0.94, 0.89, 0.26, 0.8],
        crosshairGap: 8,
        crosshairWidth: 0.6,
        dragAndDropEnabled: false,
        // Letters at the edges only where the sides of the patient are known.
        fontColor: told.oriented ? [0.75, 0.75, 0.75, 1] : [0, 0, 0, 0],
        isRadiologicalConvention: true,
        loadingText: "",
        logLevel: "error",
        sliceType: 0, // axial
      });
      await drawn.attachToCanvas(frame.querySelectorAll("canvas")[index]);
      const [low, high] = view.window;
      const volume = niivue.NVImage.loadFromBase64({
        base64: view.nifti,
        name: `${view.name}.nii.gz`,
        cal_min: low,
        cal_max: high,
      });
      drawn.addVolume(volume);
      views.push(drawn);
    }
  } catch (error) {
    return say(`The viewer could not draw: ${error.message}`);
  }

  for (const view of views) {
    view.onLocationChange = (location) => follow(view, location);
  }
  const go = (slice) => {
    const [x, y] = views[0].frac2vox(views[0].scene.crosshairPos);
    views[0].scene.crosshairPos = views[0].vox2frac([x, y, Number(slice)]);
    views[0].drawScene();
    views[0].createOnLocationChange();
  };
  slider.addEventListener("input", () => go(slider.value));
  choice?.addEventListener("change", () => {
    const [low, high] = told.windows[choice.value];
    views.forEach((view, index) => {
      if (told.views[index].unit !== told.views.at(-1).unit) return;
      view.volumes[0].cal_min = low;
      view.volumes[0].cal_max = high;
      view.updateGLVolume();
    });
  });
  go(told.start);
  frame.dataset.ready = "yes";
})();
