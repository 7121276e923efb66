// Runs in a copy of a report's page, inside a frame: measures it and writes the result as JSON into the outer page.
const problems = [];
addEventListener("error", (e) => problems.push(String(e.message || e.target.outerHTML)), true);
addEventListener("unhandledrejection", (e) => problems.push(String(e.reason)));
addEventListener("securitypolicyviolation", (e) => problems.push(`${e.violatedDirective}: ${e.blockedURI}`));
for (const kind of ["error", "warn"]) console[kind] = (...words) => problems.push(words.join(" "));

const all = (selector) => [...document.querySelectorAll(selector)];
const name = (e) => `${e.tagName} ${e.className.baseVal ?? e.className} ${e.textContent.trim().slice(0, 40)}`;
const shown = (e) => e.checkVisibility() && !e.closest("thead, noscript, script, style");
const rgb = (color) => (color.match(/[\d.]+/g) || []).map(Number);
const luminance = (color) => {
  const [r, g, b] = rgb(color).map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
const background = (e) => {
  for (; e; e = e.parentElement) {
    const color = rgb(getComputedStyle(e).backgroundColor);
    if (color.length === 3 || color[3] === 1) return getComputedStyle(e).backgroundColor;
  }
  return "rgb(255, 255, 255)";
};
const color_of = (value) => {
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.color = value;
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
};
const low_contrast = (elements) => elements.filter((e) => {
  const style = getComputedStyle(e);
  return contrast(e.closest("svg") ? style.fill : style.color, background(e)) < 4.5;
}).map(name);

addEventListener("load", () => {
  const own_text = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  const texts = all("body *").filter((e) => own_text(e) && shown(e));
  const width = innerWidth;
  const bounds = all("body *").filter((e) => shown(e) && !e.closest("clipPath, g[clip-path]")).map((e) => [e, e.getBoundingClientRect()]);
  const clipped = all("body *").filter((e) => shown(e) && getComputedStyle(e).overflowX !== "visible" && !e.closest("svg") && e.scrollWidth > e.clientWidth + 1);
  const labels_outside = all(".plot text").filter((t) => {
    const a = t.getBoundingClientRect(), b = t.closest("svg").getBoundingClientRect();
    return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
  });
  const shades = ["--card", "--s0", "--s1", "--s2", "--s3", "--s4"].map((v) => color_of(`var(${v})`));
  const curves = [0, 1, 2, 3, 4, 5].map((i) => color_of(`var(--c${i})`));
  const result = {
    width,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    scroll_width: document.documentElement.scrollWidth,
    cut_off: [...bounds.filter(([, b]) => b.left < -0.5 || b.right > width + 0.5).map(([e]) => e), ...clipped, ...labels_outside].map(name),
    texts: texts.length,
    low_contrast: low_contrast(texts),
    faint_curves: curves.flatMap((c) => shades.filter((s) => contrast(c, s) < 3).map((s) => `${c} on ${s}`)),
    images: all("img").length,
    broken_images: all("img").filter((i) => !i.complete || i.naturalWidth === 0).length,
    panels: all("[data-panel] h3").map((h) => h.id.replace("panel-", "")),
    empty_panels: all("[data-panel]").filter((f) => {
      const marks = [...f.querySelectorAll("g[clip-path] :is(path, circle, rect)")].map((m) => m.getBoundingClientRect());
      return !marks.some((m) => m.width + m.height > 4) || f.querySelector("svg").outerHTML.includes("NaN");
    }).map(name),
  };

  const first = document.querySelector("[data-panel] .plot");
  const drawings = all("[name=axis]").map((button) => {
    button.click();
    return [first.innerHTML, [...first.querySelectorAll("text")].at(-1).textContent];
  });
  result.axes = drawings.map(([, label]) => label);
  result.moved = new Set(drawings.map(([svg]) => svg)).size === 4 && !drawings.join("").includes("NaN");
  first.firstChild.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
  result.values = document.querySelector(".values").textContent;

  const terms = all(".term").filter(shown);
  result.tips = terms.length;
  result.bad_tips = terms.filter((term) => {
    term.scrollIntoView({ behavior: "instant", block: "center" });
    term.focus();
    const tip = term.querySelector(".tip"), box = tip.getBoundingClientRect();
    const fits = box.width > 100 && box.left >= 0 && box.right <= width && box.top >= 0 && box.bottom <= innerHeight;
    return !fits || low_contrast([tip]).length || !document.getElementById(term.getAttribute("aria-describedby"));
  }).map(name);
  const last = terms.at(-1).querySelector(".tip");
  const open = last.checkVisibility();
  dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
  result.closed_by_escape = open && !last.checkVisibility();

  // Pages of paper, as columns of the same size: both break by the same rules.
  for (const rule of [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules]))
    if (rule.media && rule.media.mediaText === "print") rule.media.mediaText = "all";
  Object.assign(document.body.style, { width: "700px", maxWidth: "none", height: "950px", columns: "700px", columnGap: "0", columnFill: "auto" });
  const page_of = (e) => Math.floor((e.getBoundingClientRect().left - document.body.getBoundingClientRect().left + 1) / 700);
  result.pages = page_of(document.querySelector("dl > :last-child")) + 1;
  result.torn = width < 700 ? [] : all("figure, .keep > table").filter((f) => {
    const heading = f.querySelector("h3") || f.parentElement.closest(":has(h2, h3)").querySelector("h2, h3");
    return page_of(f) !== page_of(heading) || f.getClientRects().length > 1;
  }).map(name);

  result.requests = performance.getEntriesByType("resource").map((e) => e.name).filter((url) => !url.startsWith("data:"));
  result.problems = problems;
  const out = parent.document.createElement("pre");
  out.id = "measured";
  out.textContent = JSON.stringify(result);
  parent.document.body.append(out);
});
