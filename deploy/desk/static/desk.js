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
  request.upload.onprogress = (sent) => { bar.hidden = false; bar.max = sent.total; bar.value = sent.loaded; };
  request.onload = () => {
    bar.hidden = true;
    const next = request.getResponseHeader("HX-Redirect");
    if (next) location.assign(next); else said.innerHTML = request.responseText;
  };
  request.onerror = () => { bar.hidden = true; said.textContent = form.dataset.lost; };
  request.send(file);
});

function announce(text) { document.getElementById("announce").textContent = text; }

// If the desk does not answer, say so where the answer would be.
document.addEventListener("htmx:sendError", () => {
  announce(document.documentElement.lang === "zh" ? "工作台没有响应" : "The desk does not answer.");
});

document.addEventListener("htmx:afterSwap", (event) => {
  const spoken = event.detail.target.querySelector?.("[data-announce]");
  if (spoken) announce(spoken.dataset.announce);
});
