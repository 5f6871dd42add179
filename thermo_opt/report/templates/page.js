"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("thermo-opt-figures").textContent);
  const hidden = new Set();

  // "@name" and "@name:opacity" are colours of the style sheet, so that one specification serves light and dark mode.
  const colour = (token) => {
    const [name, opacity] = token.slice(1).split(":");
    const hex = getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
    if (opacity === undefined) return hex;
    const channels = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    return `rgba(${channels.join(",")},${opacity})`;
  };
  const coloured = (value, key) => {
    if (typeof value === "string") return /color$/.test(key) && value.startsWith("@") ? colour(value) : value;
    if (Array.isArray(value)) return value.map((item) => coloured(item, key));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, coloured(v, k)]));
    }
    return value;
  };

  const draw = () => Promise.all(figures.map(({ key, data, layout }) => {
    const traces = coloured(data, "");
    for (const trace of traces) if (trace.meta) trace.visible = !hidden.has(trace.meta.run);
    const styled = coloured(layout, "");
    const element = document.getElementById(key);
    // A map with equal scales fills a narrow screen only if it is not much taller than wide.
    if (layout.yaxis.scaleanchor) element.style.height = Math.min(480, 0.8 * element.clientWidth) + "px";
    styled.font.family = getComputedStyle(document.body).fontFamily;
    // A finger on a chart scrolls the page; it would draw a zoom box otherwise.
    if (matchMedia("(pointer: coarse)").matches) styled.dragmode = false;
    return Plotly.react(key, traces, styled, { responsive: true, displayModeBar: false });
  }));

  for (const button of document.querySelectorAll("nav.toggle button")) {
    button.addEventListener("click", () => {
      const run = Number(button.dataset.run);
      if (!hidden.delete(run)) hidden.add(run);
      button.setAttribute("aria-pressed", String(!hidden.has(run)));
      draw();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw().then(() => { document.documentElement.dataset.drawn = "true"; });
})();
