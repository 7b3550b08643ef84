// Runs before the first paint, as a classic blocking script: theme and language are on <html> before anything is drawn,
// so a dark page never flashes white. Everything else is in app.js. Keys are those of preferences.js.
(function () {
  "use strict";
  var root = document.documentElement;
  var prefs = {};
  try {
    prefs = JSON.parse(localStorage.getItem("bimo.preferences") || "{}") || {};
  } catch (_) {
    // Storage is blocked or holds something else: the system's theme and language are used.
  }
  if (prefs.theme === "light" || prefs.theme === "dark") root.dataset.theme = prefs.theme;
  var language = prefs.language === "zh" || prefs.language === "en" ? prefs.language : navigator.language || "en";
  root.lang = /^zh/i.test(language) ? "zh-CN" : "en";

  // A browser too old for the modules, or a server that lost a file, must not leave a blank page.
  window.addEventListener("load", function () {
    setTimeout(function () {
      if (root.dataset.ready) return;
      var notice = document.createElement("p");
      notice.className = "boot-notice";
      notice.textContent = /^zh/.test(root.lang)
        ? "页面没能启动。请刷新，或换用新版本的浏览器。"
        : "The page could not start. Reload it, or use a newer browser.";
      document.getElementById("app").replaceChildren(notice);
    }, 8000);
  });
})();
