// The page's pictures, drawn as strokes of one width in a 20x20 box. Decorative: the button around them has the name.
// Built with `h`, not innerHTML, so that no string ever becomes markup outside markdown.js.

import { h } from "./vendor/preact.js";

const PATHS = {
  menu: "M3.5 6h13M3.5 10h13M3.5 14h13",
  panel: "M3.5 4.5h13v11h-13zM8 4.5v11",
  compose: "M10 4H5.5A1.5 1.5 0 0 0 4 5.5v9A1.5 1.5 0 0 0 5.5 16h9a1.5 1.5 0 0 0 1.5-1.5V10M8.5 11.5l.5-2.3L15.2 3a1.25 1.25 0 0 1 1.8 1.8L10.8 11z",
  search: "M9 14.500a5.5 5.5 0 1 0 0-11a5.5 5.5 0 0 0 0 11zM13 13l3.8 3.8",
  settings: "M4 6h6M14 6h2M4 14h2M10 14h6M12 8a2 2 0 1 0 0-4a2 2 0 0 0 0 4zM8 16a2 2 0 1 0 0-4a2 2 0 0 0 0 4z",
  send: "M10 16V4.500M5 9.300l5-5l5 5",
  copy: "M7.5 7.500h8v8.500h-8zM12.5 7.500V4h-8v8.500h3",
  check: "M4.5 10.500l3.7 3.700L15.5 6.5",
  regenerate: "M15.8 8.200A6.2 6.2 0 0 0 4.6 7M4.2 11.800A6.2 6.2 0 0 0 15.4 13M4.3 3.800V7h3.200M15.7 16.200V13h-3.2",
  edit: "M4.5 15.500l.8-3.400l8-8a1.6 1.6 0 0 1 2.3 0l.3.3a1.6 1.6 0 0 1 0 2.300l-8 8z",
  trash: "M4 6h12M8 6V4h4v2M5.5 6l.7 10h7.600l.7-10M8.5 9v4M11.5 9v4",
  close: "M5 5l10 10M15 5L5 15",
  previous: "M12 5l-5 5l5 5",
  next: "M8 5l5 5l-5 5",
  down: "M10 4v11.500M5 10.700l5 5l5-5",
  sun: "M10 13a3 3 0 1 0 0-6a3 3 0 0 0 0 6zM10 2.500v1.500M10 16v1.500M2.5 10H4M16 10h1.500M4.7 4.700l1 1M14.3 14.300l1 1M15.3 4.700l-1 1M5.7 14.300l-1 1",
  moon: "M16 11.800A6.5 6.5 0 0 1 8.2 4a6.5 6.5 0 1 0 7.8 7.800z",
  auto: "M10 3.500a6.5 6.5 0 1 0 0 13zM10 3.500a6.5 6.5 0 0 1 0 13",
  alert: "M10 3.500l7 12.500H3zM10 8.300v3.700M10 13.900v.1",
  thinking: "M6 15.500h8M8 17.500h4M10 2.500a4.8 4.8 0 0 0-2.6 8.800c.6.4.8 1 .8 1.700h3.600c0-.7.2-1.3.8-1.700A4.8 4.8 0 0 0 10 2.500z",
};

/** The picture called `name`, as an SVG hidden from screen readers. */
export function icon(name) {
  if (name === "stop") {
    return h("svg", { class: "icon", viewBox: "0 0 20 20", "aria-hidden": "true" },
      h("rect", { x: 5.5, y: 5.5, width: 9, height: 9, rx: 1.5, class: "icon-solid" }));
  }
  return h("svg", { class: "icon", viewBox: "0 0 20 20", "aria-hidden": "true" }, h("path", { d: PATHS[name] }));
}
