"use strict";
// The page map: a canvas of pages, one step of a recorded run at a time. What a recording holds is
// written by experiments/recorded_pages.py (rows and pages of the page table) or, of the demo's
// runs, by experiments/report.py (one owner a page).
(() => {
  const recordings = JSON.parse(document.getElementById("recordings").textContent);
  const root = document.getElementById("map");
  if (!root || !recordings.length) return;
  const COLOURS = [
    "#2f7f79", "#d98b4a", "#5b77b5", "#b5547a", "#8aa64b", "#8063a8", "#d8b24a", "#4aa3bf",
    "#b0553f", "#4f9a62", "#c983b5", "#6b6f2f", "#3f6f9a", "#cf6f6a", "#7fb5a0", "#8f6a4a",
  ];
  const LABELS = { paged: "pages, with prefix cache", oracle: "Oracle", max: "Max" };
  const STEP_MS = 110;
  const find = (name) => document.getElementById("map-" + name);
  const canvas = find("canvas"), time = find("time"), slider = find("step"), details = find("details");
  const state = { run: null, step: 0, page: null, request: null, timer: null };

  // --- from a recording to what is held at each step

  function load(recording) {
    const run = { ...recording, frames: [], isTable: "sequences" in recording };
    let pages = {}, cached = new Set(), owners = new Int32Array(recording.num_pages).fill(recording.num_sequences ?? 0);
    for (const step of recording.steps) {
      if (run.isTable) {
        pages = { ...pages, ...(step.pages ?? {}) };
        cached = new Set([...cached, ...(step.cached ?? [])]);
        for (const page of step.uncached ?? []) cached.delete(page);
        const rows = step.rows.map(([slot, sequence, length]) => ({ sequence, length, pages: pages[slot] }));
        run.frames.push({ rows, cached });
      } else {
        owners = owners.slice();
        for (const [first, count, owner] of step.owners) owners.fill(owner, first, first + count);
        run.frames.push({ owners });
      }
    }
    run.numbers = numbersOf(run);
    run.counts = run.frames.map((_, step) => countKinds(pagesAt(run, step)));
    return run;
  }

  // Requests are numbered in the order of their arrival, from 1.
  function numbersOf(run) {
    if (!run.isTable) return null;
    const leaders = [...new Set(run.sequences.map((row) => row[0]))];
    return new Map(leaders.map((leader, index) => [leader, index + 1]));
  }

  function requestOf(run, sequence) {
    if (!run.isTable) return { number: sequence + 1, name: `request ${sequence + 1}` };
    const [leader, samples] = run.sequences[sequence];
    const number = run.numbers.get(leader);
    const sample = samples > 1 ? `, sample ${sequence - leader + 1} of ${samples}` : "";
    return { number, name: `request ${number}${sample}` };
  }

  // Of each page: its kind, and of each owner which of its tokens the page has, and what is in it.
  function pagesAt(run, step) {
    const frame = run.frames[step], size = run.page_size;
    const found = Array.from({ length: run.num_pages }, () => ({ kind: "free", owners: [] }));
    if (!run.isTable) {
      const kinds = ["free", "cached", "several"];
      frame.owners.forEach((owner, page) => {
        if (owner >= run.num_sequences) found[page].kind = kinds[owner - run.num_sequences];
        else found[page] = { kind: "held", owners: [{ sequence: owner }] };
      });
      return found;
    }
    for (const page of frame.cached) found[page].kind = "cached";
    for (const { sequence, length, pages } of frame.rows) {
      const final = run.sequences[sequence][3];
      pages.forEach((page, column) => {
        const first = column * size, within = (tokens) => Math.max(0, Math.min(size, tokens - first));
        const written = within(length), later = within(Math.max(final, length)) - written;
        found[page].owners.push({ sequence, first, written, later, never: size - written - later });
        found[page].kind = found[page].owners.length > 1 ? "several" : "held";
      });
    }
    return found;
  }

  function countKinds(pages) {
    const counts = { held: 0, several: 0, cached: 0, free: 0 };
    for (const { kind } of pages) counts[kind] += 1;
    return counts;
  }

  // --- drawing

  const colourOf = (number) => COLOURS[(number - 1) % COLOURS.length];
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function fit(element, height) {
    const width = element.clientWidth, ratio = window.devicePixelRatio || 1;
    element.style.height = height + "px";
    element.width = Math.round(width * ratio);
    element.height = Math.round(height * ratio);
    const context = element.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    return context;
  }

  function gridOf(run) {
    const width = canvas.clientWidth, least = run.num_pages > 200 ? 9 : 26;
    const choices = run.num_pages > 200 ? [64, 48, 32] : [24, 16, 12, 8];
    const columns = choices.find((count) => width / count >= least) ?? choices.at(-1);
    const side = width / columns, rows = Math.ceil(run.num_pages / columns);
    return { columns, rows, side, gap: side > 20 ? 3 : 1 };
  }

  function drawPages() {
    const { run, step, page, request } = state, pages = pagesAt(run, step), grid = gridOf(run);
    const context = fit(canvas, grid.rows * grid.side);
    const isRelated = (entry) => entry.owners.some(({ sequence }) => lit.has(sequence));
    const lit = new Set(page !== null ? pages[page].owners.map((owner) => owner.sequence) : []);
    if (request !== null) {
      for (const { owners } of pages)
        for (const { sequence } of owners) if (requestOf(run, sequence).number === request) lit.add(sequence);
    }
    const colours = { ink: style("--ink"), free: style("--free"), cached: style("--cached") };
    pages.forEach((entry, index) => {
      const x = (index % grid.columns) * grid.side + grid.gap / 2;
      const y = Math.floor(index / grid.columns) * grid.side + grid.gap / 2, side = grid.side - grid.gap;
      context.globalAlpha = lit.size && !isRelated(entry) ? 0.28 : 1;
      drawPage(context, entry, x, y, side, colours);
      context.globalAlpha = 1;
      if (index === page) {
        context.strokeStyle = colours.ink;
        context.lineWidth = 2;
        context.strokeRect(x - 1, y - 1, side + 2, side + 2);
      }
    });
  }

  function drawPage(context, entry, x, y, side, colours) {
    const alpha = context.globalAlpha, size = state.run.page_size;
    context.fillStyle = entry.kind === "cached" ? colours.cached : colours.free;
    context.fillRect(x, y, side, side);
    if (entry.kind === "several" && !entry.owners.length) {
      context.fillStyle = colours.ink;
      context.fillRect(x, y, side, side);
    }
    const shown = entry.owners.slice(0, 4), height = side / Math.max(shown.length, 1);
    shown.forEach((owner, band) => {
      context.fillStyle = colourOf(requestOf(state.run, owner.sequence).number);
      const top = y + band * height, unit = side / size;
      if (owner.written === undefined) {
        context.fillRect(x, top, side, height);
        return;
      }
      context.fillRect(x, top, owner.written * unit, height);
      context.globalAlpha = 0.4 * alpha;
      context.fillRect(x + owner.written * unit, top, owner.later * unit, height);
      context.globalAlpha = alpha;
      if (owner.never) hatch(context, x + side - owner.never * unit, top, owner.never * unit, height, alpha);
    });
    if (entry.owners.length > 1) {
      context.strokeStyle = colours.ink;
      context.lineWidth = 1.5;
      context.strokeRect(x + 0.75, y + 0.75, side - 1.5, side - 1.5);
    }
    if (side > 22 && entry.owners.length) label(context, entry, x, y, side);
  }

  function hatch(context, x, y, width, height, alpha) {
    context.save();
    context.globalAlpha = 0.16 * alpha;
    context.fillRect(x, y, width, height);
    context.beginPath();
    context.rect(x, y, width, height);
    context.clip();
    context.globalAlpha = 0.5 * alpha;
    context.strokeStyle = context.fillStyle;
    context.lineWidth = 1;
    context.beginPath();
    for (let offset = -height; offset < width; offset += 5) {
      context.moveTo(x + offset, y + height);
      context.lineTo(x + offset + height, y);
    }
    context.stroke();
    context.restore();
  }

  // The request's number, and of a shared page how many hold it, with a rim that any colour allows.
  function label(context, entry, x, y, side) {
    const numbers = new Set(entry.owners.map(({ sequence }) => requestOf(state.run, sequence).number));
    const count = entry.owners.length > 1 ? "\u00d7" + entry.owners.length : "";
    const text = numbers.size > 1 ? count : [...numbers][0] + (side > 36 ? count : "");
    context.font = `600 ${side > 36 ? 12 : 10.5}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineJoin = "round";
    context.lineWidth = 3.5;
    context.strokeStyle = style("--card");
    context.fillStyle = style("--ink");
    context.strokeText(text, x + side / 2, y + side / 2 + 0.5);
    context.fillText(text, x + side / 2, y + side / 2 + 0.5);
  }

  function drawTime() {
    const { run, step } = state, context = fit(time, 52), width = time.clientWidth, height = 52;
    const unit = width / run.frames.length;
    const bands = [["several", style("--ink")], ["held", style("--accent")], ["cached", style("--cached")], ["free", style("--free")]];
    run.counts.forEach((counts, index) => {
      let bottom = height;
      for (const [kind, colour] of bands) {
        const share = (counts[kind] / run.num_pages) * height;
        context.fillStyle = colour;
        context.fillRect(index * unit, bottom - share, unit + 0.5, share);
        bottom -= share;
      }
    });
    context.fillStyle = style("--bad");
    context.fillRect(Math.min((step + 0.5) * unit, width - 2) - 1, 0, 2, height);
  }

  // --- words

  const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
  const element = (name, text, parent) => parent.appendChild(Object.assign(document.createElement(name), { textContent: text }));

  function swatch(parent, number) {
    const made = parent.appendChild(document.createElement("i"));
    made.className = "swatch";
    made.style.background = colourOf(number);
  }

  function describe() {
    const { run, step, page } = state;
    details.replaceChildren();
    if (page === null) {
      element("span", "Point at a page, tap it, or choose it with the arrow keys, to see who holds it.", details);
      return;
    }
    const entry = pagesAt(run, step)[page];
    const kinds = {
      free: "free", cached: "cached: nobody holds it, and it is kept for prompts that begin alike",
      held: "held by one sequence",
      several: entry.owners.length ? `shared by ${entry.owners.length} sequences` : "shared by several sequences",
    };
    element("strong", `Page ${page}`, details);
    element("span", ` is ${kinds[entry.kind]}.`, details);
    const list = element("ul", "", details);
    for (const owner of entry.owners) {
      const item = element("li", "", list), { number, name } = requestOf(run, owner.sequence);
      swatch(item, number);
      element("span", name + tokensOf(run, owner), item);
    }
  }

  function tokensOf(run, owner) {
    if (owner.written === undefined) return "";
    const last = owner.first + run.page_size - 1;
    const parts = [`${owner.written} of ${run.page_size} written`];
    if (owner.later) parts.push(`${owner.later} reserved and used later`);
    if (owner.never) parts.push(`${owner.never} reserved and never used`);
    return `: its tokens ${owner.first} to ${last}, ${parts.join(", ")}`;
  }

  function tell() {
    const { run, step } = state, counts = run.counts[step], at = run.steps[step], frame = run.frames[step];
    find("now").textContent = `${step + 1} of ${run.frames.length}, ${at.end_s.toFixed(2)} s`;
    slider.setAttribute("aria-valuetext", `step ${step + 1} of ${run.frames.length}`);
    const parts = [`${plural(counts.held + counts.several, "page")} held, ${counts.several} of them shared, ${counts.cached} cached, ${counts.free} free.`];
    if (run.isTable) parts.unshift(`${plural(frame.rows.length, "sequence")} running, ${at.waiting ?? 0} waiting.`);
    const done = [];
    if (at.preempted) done.push(`${plural(at.preempted, "sequence")} made way`);
    if (at.copied) done.push(`${plural(at.copied, "page")} copied before a write`);
    if (at.found) done.push(`${plural(at.found, "prompt token")} found in the cache`);
    if (done.length) parts.push(`In this step ${done.join(", ")}.`);
    find("counts").textContent = parts.join(" ");
    const running = find("running");
    running.replaceChildren();
    for (const { sequence, length, pages } of frame.rows ?? []) {
      const { number, name } = requestOf(run, sequence), item = element("li", "", running);
      swatch(item, number);
      element("span", `${name.replace("request ", "")}: ${plural(length, "token")}, ${plural(pages.length, "page")}`, item);
      item.addEventListener("pointerenter", () => { state.request = number; drawPages(); });
      item.addEventListener("pointerleave", () => { state.request = null; drawPages(); });
    }
  }

  function show() {
    slider.value = state.step;
    drawPages();
    drawTime();
    tell();
    describe();
  }

  // --- what a reader does

  function go(step) {
    state.step = Math.max(0, Math.min(state.run.frames.length - 1, step));
    state.request = null;
    show();
  }

  function play(isOn) {
    clearInterval(state.timer);
    state.timer = null;
    if (isOn) {
      if (state.step === state.run.frames.length - 1) go(0);
      state.timer = setInterval(() => {
        if (state.step === state.run.frames.length - 1) play(false);
        else go(state.step + 1);
      }, STEP_MS);
    }
    find("play").textContent = isOn ? "Pause" : "Play";
    find("play").setAttribute("aria-pressed", String(isOn));
    // Whoever listens is told of pages that they choose, and not of each step of a film.
    details.setAttribute("aria-live", isOn ? "off" : "polite");
  }

  function choose(page) {
    state.page = page;
    drawPages();
    describe();
  }

  function pageUnder(event) {
    const grid = gridOf(state.run), box = canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / grid.side);
    const page = Math.floor((event.clientY - box.top) / grid.side) * grid.columns + column;
    return column >= 0 && column < grid.columns && page >= 0 && page < state.run.num_pages ? page : null;
  }

  function select(index) {
    const end_s = state.run?.steps[state.step].end_s;
    play(false);
    state.run = load(recordings[index]);
    state.page = null;
    slider.max = state.run.frames.length - 1;
    // The same moment under another rule; at first, and where that run is over, when most is shared.
    const later = state.run.steps.findIndex((step) => step.end_s >= end_s);
    const held = state.run.counts.map((counts) => counts.several * 1e3 + counts.held);
    go(later >= 0 ? later : held.indexOf(Math.max(...held)));
  }

  canvas.addEventListener("pointermove", (event) => choose(pageUnder(event)));
  canvas.addEventListener("pointerdown", (event) => choose(pageUnder(event)));
  canvas.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") choose(null); });
  canvas.addEventListener("focus", () => { if (state.page === null && canvas.matches(":focus-visible")) choose(0); });
  canvas.addEventListener("keydown", (event) => {
    const { columns } = gridOf(state.run), at = state.page ?? 0, last = state.run.num_pages - 1;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    if (event.key in moves) choose(Math.max(0, Math.min(last, at + moves[event.key])));
    else if (event.key === ",") go(state.step - 1);
    else if (event.key === ".") go(state.step + 1);
    else if (event.key === " ") play(state.timer === null);
    else if (event.key === "Escape") choose(null);
    else return;
    event.preventDefault();
  });
  time.addEventListener("pointerdown", (event) => {
    const seek = (at) => go(Math.floor(((at.clientX - time.getBoundingClientRect().left) / time.clientWidth) * state.run.frames.length));
    const stop = () => { time.removeEventListener("pointermove", seek); };
    play(false);
    seek(event);
    time.setPointerCapture(event.pointerId);
    time.addEventListener("pointermove", seek);
    time.addEventListener("pointerup", stop, { once: true });
    time.addEventListener("pointercancel", stop, { once: true });
  });
  slider.addEventListener("input", () => { play(false); go(Number(slider.value)); });
  find("play").addEventListener("click", () => play(state.timer === null));
  find("back").addEventListener("click", () => { play(false); go(state.step - 1); });
  find("on").addEventListener("click", () => { play(false); go(state.step + 1); });
  recordings.forEach((recording, index) => {
    const choice = element("label", "", find("runs"));
    const radio = Object.assign(document.createElement("input"), { type: "radio", name: "run", checked: index === 0 });
    radio.addEventListener("change", () => select(index));
    choice.append(radio, LABELS[recording.name] ?? recording.name);
  });
  window.addEventListener("resize", () => { drawPages(); drawTime(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawPages(); drawTime(); });
  select(0);
})();
