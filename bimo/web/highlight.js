// Colours for code blocks. The highlighter (20 kB) and each language (0.3 to 14 kB) are fetched when a block first needs
// them: a page that shows no code loads none of it. Names that are not in the table stay plain; nothing is guessed,
// because guessing runs every grammar over every block.

const ALIASES = {
  "c++": "cpp", cc: "cpp", h: "c", hpp: "cpp", cs: "csharp", "c#": "csharp", docker: "dockerfile", golang: "go",
  html: "xml", svg: "xml", vue: "xml", js: "javascript", jsx: "javascript", mjs: "javascript", node: "javascript",
  jsonc: "json", json5: "json", kt: "kotlin", tex: "latex", make: "makefile", md: "markdown", patch: "diff",
  ps1: "powershell", py: "python", python3: "python", rb: "ruby", rs: "rust", console: "shell", terminal: "shell",
  sh: "bash", zsh: "bash", mysql: "sql", postgresql: "sql", sqlite: "sql", toml: "ini", ts: "typescript",
  tsx: "typescript", yml: "yaml",
};

const LANGUAGES = new Set([
  "bash", "c", "cpp", "csharp", "css", "diff", "dockerfile", "go", "ini", "java", "javascript", "json", "kotlin", "latex",
  "lua", "makefile", "markdown", "php", "powershell", "python", "r", "ruby", "rust", "scss", "shell", "sql", "swift",
  "typescript", "xml", "yaml",
]);

// Grammars that embed others colour them only if those are registered too.
const EMBEDDED = { xml: ["css", "javascript"], php: ["xml"], shell: ["bash"], markdown: ["xml"], typescript: ["javascript"] };

const MAX_CHARACTERS = 60_000; // a longer block would freeze the page for a noticeable moment; it stays plain

const loaded = new Map();

/** The name of the grammar for a fence's language tag, or "" for none. */
export function grammarOf(tag) {
  const name = ALIASES[tag] ?? tag;
  return LANGUAGES.has(name) ? name : "";
}

function loadGrammar(name) {
  if (!loaded.has(name)) {
    const parts = [import("./vendor/highlight.js"), import(`./vendor/languages/${name}.js`),
      ...(EMBEDDED[name] ?? []).map(loadGrammar)];
    const ready = Promise.all(parts).then(([{ default: highlighter }, { default: grammar }]) => {
      highlighter.registerLanguage(name, grammar);
      return highlighter;
    });
    ready.catch(() => loaded.delete(name));
    loaded.set(name, ready);
  }
  return loaded.get(name);
}

/** The highlighter's markup as nodes: its output is spans with classes and escaped text, and only that is taken over. */
function toNodes(markup) {
  const parsed = new DOMParser().parseFromString(markup, "text/html").body;
  const copy = (source, target) => {
    for (const child of source.childNodes) {
      if (child.nodeType === Node.TEXT_NODE) target.append(child.data);
      else if (child.nodeName === "SPAN") {
        const span = document.createElement("span");
        span.className = child.className;
        copy(child, span);
        target.append(span);
      }
    }
    return target;
  };
  return copy(parsed, document.createDocumentFragment());
}

/** Colour the text of a `<code>` element in place; does nothing for unknown languages. */
export async function highlight(element, tag) {
  const name = grammarOf(tag);
  const text = element.textContent;
  if (!name || text.length > MAX_CHARACTERS) return;
  try {
    const highlighter = await loadGrammar(name);
    const { value } = highlighter.highlight(text, { language: name, ignoreIllegals: true });
    if (element.textContent === text) element.replaceChildren(toNodes(value));
  } catch {
    // The grammar could not be fetched or gave up: plain code is still code.
  }
}
