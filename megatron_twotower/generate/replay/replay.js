// Plays a recording of mask diffusion. Each `.replay` element contains a recording as JSON; this script
// adds its controls.
// `#step=N` in the address opens a page at that step.
(() => {
  "use strict";

  const element = (tag, name = "", text = "") => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    made.textContent = text;
    return made;
  };
  const percent = (p) => (p > 0 && p < 0.0005 ? "under 0.1 %" : `${(100 * p).toFixed(1)} %`);
  const visible = (piece) => piece.replaceAll("\n", "↵").replaceAll("\t", "→");
  const quoted = (piece) => `“${visible(piece)}”`;

  // Every position of the text: the step that commits it, and the prediction of each step up to that one.
  const readPositions = (recording) => {
    const positions = [];
    recording.blocks.forEach((steps, block) => {
      steps[0].predicted.forEach((_, column) => {
        const step = steps.findIndex((each) => each.committed.includes(column));
        const guesses = steps.slice(0, step + 1).map((each) => ({
          piece: recording.pieces[each.predicted[column]], id: each.predicted[column], sure: each.confidence[column],
        }));
        positions.push({ block, column, step, guesses, ...guesses[step] });
      });
    });
    positions.forEach((position, index) => { position.cut = index >= recording.new_tokens; });
    return positions;
  };

  // The frames to show: every block before its first step (step -1) and after each step.
  const readFrames = (recording) =>
    recording.blocks.flatMap((steps, block) => [{ block, step: -1 }, ...steps.map((_, step) => ({ block, step }))]);

  const describe = (position, frame) => {
    const tip = document.createDocumentFragment();
    const line = (text, code) => {
      const added = element("div", "", text);
      if (code) added.append(element("code", "", code));
      tip.append(added);
    };
    const where = `position ${position.column + 1} of block ${position.block + 1}`;
    if (position.block < frame.block || position.step <= frame.step) {
      line("token ", quoted(position.piece));
      line(`committed at step ${position.step + 1}, with ${percent(position.sure)}`);
      line(`${where}, id ${position.id}${position.cut ? ", after the end" : ""}`);
    } else if (frame.step < 0) {
      line(`masked, ${where}`);
    } else {
      const guess = position.guesses[frame.step];
      line("masked; best guess ", quoted(guess.piece));
      line(`with ${percent(guess.sure)} at step ${frame.step + 1}`);
      line(`${where}, id ${guess.id}`);
    }
    return tip;
  };

  const makeText = (recording, positions) => {
    const text = element("pre", "rp-text");
    text.append(element("span", "rp-prompt", recording.prompt));
    for (const position of positions) {
      // The tile of a line break shows a sign only; the break and its indentation follow the tile.
      const line = position.piece.indexOf("\n");
      const tile = element("span", "rp-token", line < 0 ? position.piece : visible(position.piece).trimEnd());
      const rest = element("span", "", line < 0 ? "" : position.piece.slice(line));
      tile.dataset.position = positions.indexOf(position);
      position.parts = [tile, rest];
      text.append(tile, rest);
    }
    return text;
  };

  const paintText = (positions, frame) => {
    for (const position of positions) {
      const [tile, rest] = position.parts;
      tile.hidden = rest.hidden = position.block > frame.block;
      if (tile.hidden) continue;
      const masked = position.block === frame.block && position.step > frame.step;
      const guess = masked ? position.guesses[Math.max(frame.step, 0)] : position;
      const fresh = position.block === frame.block && position.step === frame.step;
      tile.className = `rp-token ${masked ? "masked" : "written"}${fresh ? " fresh" : ""}${position.cut ? " cut" : ""}`;
      tile.style.setProperty("--sure", masked && frame.step < 0 ? 0 : guess.sure);
      tile.dataset.guess = masked && frame.step >= 0 ? visible(guess.piece) : "";
    }
  };

  const makeMap = (recording, block, positions) => {
    const [map, head, body] = [element("table", "rp-map"), element("thead"), element("tbody")];
    const own = positions.filter((position) => position.block === block);
    const first = positions.indexOf(own[0]);
    map.style.setProperty("--columns", own.length);
    const top = element("tr");
    top.append(element("th"), ...own.map((position) => element("th", "", position.column + 1)));
    head.append(top);
    recording.blocks[block].forEach((each, step) => {
      const row = element("tr");
      row.dataset.step = step;
      row.append(element("th", "", `step ${step + 1}`.padEnd(8) + `t ${each.t.toFixed(2)}  +${each.committed.length}`));
      for (const position of own) {
        const guess = position.guesses[step];
        const cell = element("td", "past", "·");
        if (guess) {
          cell.textContent = visible(guess.piece).trim();
          cell.className = position.step === step ? "fresh" : "guess";
          cell.style.setProperty("--sure", guess.sure);
        }
        cell.dataset.position = first + position.column;
        row.append(cell);
      }
      body.append(row);
    });
    map.append(head, body);
    return map;
  };

  const button = (name, text, label, act) => {
    const made = element("button", name, text);
    made.type = "button";
    made.setAttribute("aria-label", label);
    made.title = label;
    made.addEventListener("click", act);
    return made;
  };

  const mount = (root) => {
    const recording = JSON.parse(root.querySelector("script[type='application/json']").textContent);
    const [positions, frames] = [readPositions(recording), readFrames(recording)];
    let [current, timer, mapped] = [-1, null, -1];

    const where = element("span", "rp-where");
    const note = element("span", "rp-note");
    where.setAttribute("aria-live", "polite");
    const summary = element("span", "rp-note rp-end", recording.summary);
    const text = makeText(recording, positions);
    const scroll = element("div", "rp-scroll rp-section");
    const tip = element("div", "rp-tip");

    const slider = element("input", "rp-slider");
    Object.assign(slider, { type: "range", min: 0, max: frames.length - 1, value: 0 });
    slider.setAttribute("aria-label", "step");
    const speed = element("select");
    for (const [label, milliseconds] of [["slow", 1400], ["normal", 650], ["fast", 220], ["very fast", 70]]) {
      speed.append(new Option(label, milliseconds, label === "normal", label === "normal"));
    }
    speed.setAttribute("aria-label", "speed");

    const show = (index) => {
      current = Math.min(Math.max(index, 0), frames.length - 1);
      const frame = frames[current];
      const steps = recording.blocks[frame.block];
      const left = positions.filter((each) => each.block === frame.block && each.step > frame.step).length;
      where.textContent = `block ${frame.block + 1} of ${recording.blocks.length}, ` +
        (frame.step < 0 ? "all masks" : `step ${frame.step + 1} of ${steps.length}`);
      note.textContent = frame.step < 0 ? `${left} to write`
        : `t = ${steps[frame.step].t.toFixed(2)}, ${steps[frame.step].committed.length} committed, ${left} left`;
      paintText(positions, frame);
      if (mapped !== frame.block) {
        scroll.replaceChildren(makeMap(recording, frame.block, positions));
        mapped = frame.block;
      }
      for (const row of scroll.querySelectorAll("tbody tr")) {
        row.className = row.dataset.step > frame.step ? "later" : row.dataset.step == frame.step ? "now" : "";
      }
      slider.value = current;
      root.dataset.frame = current;
      tip.classList.remove("shown");
    };
    const stop = () => {
      clearTimeout(timer);
      timer = null;
      play.textContent = "▶ play";
      play.setAttribute("aria-label", "play");
    };
    const next = () => {
      show(current + 1);
      if (current === frames.length - 1) stop();
      else timer = setTimeout(next, Number(speed.value));
    };
    const toggle = () => {
      if (timer !== null) return stop();
      if (current === frames.length - 1) show(0);
      play.textContent = "⏸ pause";
      play.setAttribute("aria-label", "pause");
      timer = setTimeout(next, Number(speed.value));
    };
    const go = (index) => { stop(); show(index); };
    const blockStart = (block) => frames.findIndex((frame) => frame.block === block);

    const play = button("rp-play", "", "play", toggle);
    const guesses = element("label", "rp-note");
    const box = element("input");
    Object.assign(box, { type: "checkbox", checked: true });
    box.addEventListener("change", () => root.classList.toggle("rp-hide-guesses", !box.checked));
    guesses.append(box, "guesses");
    slider.addEventListener("input", () => go(Number(slider.value)));

    const bar = (...children) => {
      const made = element("div", "rp-bar");
      made.append(...children);
      return made;
    };
    const controls = bar(
      play,
      button("rp-back", "‹", "one step back", () => go(current - 1)),
      button("rp-forward", "›", "one step on", () => go(current + 1)),
      button("rp-previous", "«", "to the block before", () => go(blockStart(Math.max(frames[current].block - 1, 0)))),
      button("rp-next", "»", "to the next block",
        () => go(blockStart(Math.min(frames[current].block + 1, recording.blocks.length - 1)))),
      slider, speed, guesses,
    );
    controls.classList.add("rp-section");
    const legend = bar(element("span", "rp-note", "unsure"), element("span", "rp-scale"), element("span", "rp-note", "sure"),
      element("span", "rp-note rp-end", "framed: committed at this step · line under a mask: how sure of its guess"));
    root.append(bar(where, note, summary), text, controls, scroll, legend, tip);
    legend.classList.add("rp-section");

    scroll.addEventListener("click", (event) => {
      const row = event.target.closest("tbody tr");
      if (row) go(blockStart(frames[current].block) + 1 + Number(row.dataset.step));
    });
    root.addEventListener("mouseover", (event) => {
      const target = event.target.closest("[data-position]");
      if (!target) return tip.classList.remove("shown");
      const row = target.closest("tr");
      const frame = row ? { block: frames[current].block, step: Number(row.dataset.step) } : frames[current];
      tip.replaceChildren(describe(positions[target.dataset.position], frame));
      const place = target.getBoundingClientRect();
      const left = Math.min(Math.max(8, place.left), window.innerWidth - tip.offsetWidth - 8);
      const above = place.top - tip.offsetHeight - 8;
      tip.style.transform = `translate(${left}px, ${above < 8 ? place.bottom + 8 : above}px)`;
      return tip.classList.add("shown");
    });
    root.addEventListener("mouseleave", () => tip.classList.remove("shown"));
    root.tabIndex = 0;
    root.addEventListener("keydown", (event) => {
      if (event.target !== root && event.target !== play) return;
      const keys = { ArrowLeft: () => go(current - 1), ArrowRight: () => go(current + 1), Home: () => go(0),
        End: () => go(frames.length - 1), ...(event.target === root && { " ": toggle }) };
      if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
    });
    const asked = /#step=(\d+)/.exec(window.location.hash);
    stop();
    show(asked ? Number(asked[1]) : frames.length - 1);
  };

  document.querySelectorAll(".replay").forEach(mount);
})();
