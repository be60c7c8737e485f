// Reads the page again every two seconds and takes over the sections that differ. Sections have ids. One in which the
// keyboard's focus is stays as it is, so that nothing moves under the operator's hands.
"use strict";
(() => {
  const main = document.querySelector("main[data-live]");
  if (!main) return;
  let busy = false;
  const adopt = (fresh) => {
    const open = new Set([...main.querySelectorAll("details[open][id]")].map((d) => d.id));
    for (const section of fresh.querySelectorAll("section[id]")) {
      for (const id of open) section.querySelector("#" + CSS.escape(id))?.setAttribute("open", "");
      const old = document.getElementById(section.id);
      if (!old) continue;
      if (old.contains(document.activeElement) && document.activeElement.matches("input, select, textarea, button")) continue;
      if (old.outerHTML !== section.outerHTML) {
        const link = old.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
        old.replaceWith(document.adoptNode(section));
        if (link) document.querySelector(`#${CSS.escape(section.id)} a[href="${CSS.escape(link)}"]`)?.focus();
      }
    }
    const ids = (root) => [...root.querySelectorAll("section[id]")].map((s) => s.id).join(" ");
    if (ids(main) !== ids(fresh) && !main.contains(document.activeElement)) main.replaceChildren(...fresh.childNodes);
  };
  const state = (text) => {
    const line = document.getElementById("freshness");
    if (line && line.textContent !== text) line.textContent = text;
  };
  setInterval(async () => {
    if (busy || document.hidden) return;
    busy = true;
    try {
      const response = await fetch(location.href, { headers: { accept: "text/html" }, signal: AbortSignal.timeout(10000) });
      if (response.redirected) return location.reload();
      const page = new DOMParser().parseFromString(await response.text(), "text/html");
      const fresh = page.querySelector("main[data-live]");
      if (fresh) {
        adopt(fresh);
        state("");
      } else state(`The console refused this page (${response.status}); what you see is old.`);
    } catch {
      state("The console does not respond; what you see is old.");
    } finally {
      busy = false;
    }
  }, 2000);
})();
