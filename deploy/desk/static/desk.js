// What HTML and htmx cannot do: uploads with progress, the keys of the review page, and messages for screen readers.
"use strict";

// A file goes up as the body of a request, so that it is never held in memory.
document.addEventListener("submit", (event) => {
  const form = event.target.closest("form[data-upload]");
  if (!form) return;
  event.preventDefault();
  const file = form.querySelector("input[type=file]").files[0];
  const bar = form.querySelector("progress");
  const said = form.querySelector("[data-said]");
  if (!file) return;
  const request = new XMLHttpRequest();
  request.open("POST", form.dataset.upload + "?name=" + encodeURIComponent(file.name));
  request.setRequestHeader("X-CSRF-Token", document.body.dataset.csrf);
  request.setRequestHeader("HX-Request", "true");
  request.setRequestHeader("Content-Type", "application/octet-stream");
  let quarter = 0;
  request.upload.onprogress = (sent) => {
    bar.hidden = false; bar.max = sent.total; bar.value = sent.loaded;
    const now = Math.floor(4 * sent.loaded / sent.total);
    if (now > quarter) announce(`${25 * (quarter = now)}%`);
  };
  request.onload = () => {
    bar.hidden = true;
    const next = request.getResponseHeader("HX-Redirect");
    if (next) location.assign(next); else said.innerHTML = request.responseText;
  };
  request.onerror = () => { bar.hidden = true; said.textContent = form.dataset.lost; };
  request.send(file);
});

// A table that is wider than the screen scrolls, also by keyboard.
function reachWideTables() {
  for (const each of document.querySelectorAll(".scroll")) {
    if (each.scrollWidth > each.clientWidth) each.tabIndex = 0; else each.removeAttribute("tabindex");
  }
}
for (const event of ["DOMContentLoaded", "htmx:afterSettle"]) document.addEventListener(event, reachWideTables);
addEventListener("resize", reachWideTables);
addEventListener("load", reachWideTables);

function announce(text) { document.getElementById("announce").textContent = text; }

// If the desk does not answer, say so.
function showLost(lost) {
  const line = document.getElementById("lost");
  line.textContent = lost ? line.dataset.said : "";
  line.hidden = !lost;
  if (lost) line.scrollIntoView({ block: "nearest" });
}
document.addEventListener("htmx:sendError", () => showLost(true));
document.addEventListener("htmx:beforeOnLoad", () => showLost(false));

document.addEventListener("htmx:afterSwap", (event) => {
  const spoken = event.detail.target.querySelector?.("[data-announce]");
  if (spoken) announce(spoken.dataset.announce);
});

// A job's state is announced when it changes. The page is loaded again at the end, so the tab remembers what was said.
function followJobs() {
  for (const job of document.querySelectorAll(".job")) {
    const said = sessionStorage.getItem(job.id), now = job.dataset.state, active = job.hasAttribute("hx-get");
    if (said !== now && (active || said !== null)) setTimeout(announce, 100, now); // a change is heard only after the page has loaded
    if (active) sessionStorage.setItem(job.id, now); else sessionStorage.removeItem(job.id);
  }
}
document.addEventListener("htmx:afterSettle", followJobs);
addEventListener("load", followJobs);

// A page that is loaded again, for another language or at the end of a job, keeps what was typed. An answer is asked again.
function typed() {
  return [...document.querySelectorAll("main :is(textarea, select, input:not([type=password], [type=file], [type=hidden], [type=checkbox]))")];
}
document.addEventListener("htmx:beforeOnLoad", (event) => {
  if (event.detail.xhr.getResponseHeader("HX-Refresh") !== "true") return;
  const again = document.querySelector("form[data-again]");
  const asked = Boolean(again && document.querySelector(again.dataset.again).childElementCount);
  const values = Object.fromEntries(typed().map((each) => [each.name, each.value]));
  sessionStorage.setItem("typed", JSON.stringify({ page: location.pathname, asked, values }));
});
addEventListener("load", () => {
  const kept = JSON.parse(sessionStorage.getItem("typed"));
  sessionStorage.removeItem("typed");
  if (kept?.page !== location.pathname) return;
  for (const each of typed()) each.value = kept.values[each.name] ?? each.value;
  if (kept.asked) document.querySelector("form[data-again]")?.requestSubmit();
});

// The review page: its keys, the search of categories, and where the focus goes.
(() => {
  const SETTLE = 250; // ms after a new text in which nothing is sent, so that a double press does not label it unread
  let busy = false, shownAt = 0;
  const within = (selector) => document.querySelector("#review " + selector);
  const finder = () => within("#find");
  const options = () => [...document.querySelectorAll("#options [data-category]")];

  function mark(option) {
    for (const each of options()) each.setAttribute("aria-selected", String(each === option));
    if (option) finder().setAttribute("aria-activedescendant", option.id); else finder().removeAttribute("aria-activedescendant");
    option?.scrollIntoView({ block: "nearest" });
  }

  function open(shown) {
    within("#options").hidden = !shown;
    finder().setAttribute("aria-expanded", String(shown));
    if (!shown) mark(null);
  }

  function choose(option) {
    const button = within("#found");
    button.value = option.dataset.category;
    button.click();
  }

  function tickAll(button) {
    const ticks = [...document.querySelectorAll("#review input[name=also]")];
    const ticked = !ticks.every((each) => each.checked);
    for (const each of ticks) each.checked = ticked;
    announce(button.dataset.said.replace("{number}", ticked ? ticks.length : 0));
  }

  function searchKey(event) {
    const all = options(), at = all.findIndex((each) => each.getAttribute("aria-selected") === "true");
    const closed = within("#options").hidden;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const next = event.key === "ArrowDown" ? at + 1 : (at < 0 ? all.length : at) - 1;
      if (closed) htmx.trigger(finder(), "find"); else if (all.length) mark(all.at(next % all.length));
    } else if (event.key === "Enter") {
      // Only what answers the words in the field: the search of the last letters may still be under way.
      if (!closed && at >= 0 && all[0].dataset.query === finder().value) choose(all[at]);
    } else if (event.key === "Escape") {
      finder().value = "";
      open(false);
      within("h2").focus();
    } else return;
    event.preventDefault();
  }

  document.addEventListener("keydown", (event) => {
    // Enter and Escape of an input method choose characters.
    if (event.isComposing || event.keyCode === 229 || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.id === "find") { searchKey(event); return; }
    // Browsers would press the first button of the form.
    if (event.key === "Enter" && event.target.name === "also") { event.preventDefault(); return; }
    const keys = document.getElementById("keys");
    if (!keys?.checked || event.repeat || busy || event.target.matches("input:not([type=checkbox]), textarea, select")) return;
    if (event.key === "/" && finder()) finder().focus();
    else {
      const button = /^[1-9nsua]$/.test(event.key) && within(`[data-key="${event.key}"]`);
      if (!button) return;
      button.click();
    }
    event.preventDefault();
  });

  document.addEventListener("click", (event) => {
    const option = event.target.closest("#options [data-category]");
    if (option) choose(option);
    const button = event.target.closest("[data-tick]");
    if (button) tickAll(button);
  });

  document.addEventListener("mousedown", (event) => {
    if (event.target.closest("#options")) event.preventDefault(); // keeps the focus in the field
  });

  document.addEventListener("focusout", (event) => { if (event.target.id === "find" && finder()) open(false); });

  document.addEventListener("htmx:beforeRequest", (event) => {
    if (!event.detail.elt.matches("[data-acts]")) return;
    if (busy || performance.now() - shownAt < SETTLE) event.preventDefault(); else busy = true;
  });

  // The form that asked is gone by now, so the event comes from what is around it.
  document.addEventListener("htmx:afterRequest", (event) => {
    if (event.detail.requestConfig.elt.matches("[data-acts]")) busy = false;
  });

  document.addEventListener("htmx:sendError", (event) => {
    const lost = within("[data-lost]");
    if (lost && event.detail.requestConfig.elt.matches("[data-acts]")) lost.hidden = false;
  });

  document.addEventListener("htmx:afterSwap", (event) => {
    if (event.detail.target.id === "review") {
      shownAt = performance.now();
      within("h2")?.focus();
    } else if (event.detail.target.id === "options") {
      open(document.activeElement === finder());
      mark(options()[0]);
    }
  });

  // Single keys can be turned off, for people whose own tools press keys (WCAG 2.1.4). The browser remembers it.
  const keys = document.getElementById("keys");
  if (!keys) return;
  keys.checked = localStorage.getItem("keys") !== "off";
  keys.addEventListener("change", () => localStorage.setItem("keys", keys.checked ? "on" : "off"));
})();
