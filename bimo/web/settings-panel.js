// The settings sheet: how answers are made, how the page looks, the key, and the user's data. A native <dialog>: the
// browser keeps the focus inside, closes it on Escape and hands the focus back.

import { model, server, stopAll } from "./chat.js";
import { number, t } from "./i18n.js";
import { eraseEverything, exportText, importText, summaries } from "./library.js";
import { confirm, KeyForm, notify } from "./notices.js";
import { apiKey, LANGUAGE_CHOICES, languageChoice, setApiKey, theme, THEMES } from "./preferences.js";
import { change, FIELDS, fit, isChanged, reset, settings } from "./settings.js";
import { downloadText, html, IconButton, signal, useEffect, useRef } from "./ui.js";

const opened = signal(false);

export function openSettings() {
  opened.value = true;
}

function ResetButton({ name, label }) {
  if (!isChanged(name)) return null;
  return html`<button type="button" class="link-button" aria-label=${t("settings.reset.of", { name: label })}
    onClick=${() => reset(name)}>${t("settings.reset")}</button>`;
}

function Field({ field }) {
  const { name, kind } = field;
  const value = settings.value[name];
  const label = t(`settings.${name}`);
  const id = `setting-${name}`;
  const common = { id, "aria-describedby": `${id}-help` };
  const commit = (event) => {
    const fitted = fit(field, event.target.value);
    change(name, fitted);
    event.target.value = fitted ?? ""; // what was typed out of range is shown as what is used
  };
  const numberInput = html`<input ...${common} class="input number" type="number" inputmode=${kind === "integer" ? "numeric" : "decimal"}
    min=${field.min} max=${field.max} step=${field.step} value=${value ?? ""} placeholder=${field.optional ? t("settings.unset") : ""}
    onChange=${commit} />`;
  return html`<div class="field">
    <div class="field-head">
      <label for=${id}>${label}</label>
      <${ResetButton} name=${name} label=${label} />
      ${kind !== "lines" && numberInput}
    </div>
    ${kind === "slider" && html`<input class="slider" type="range" aria-label=${label} aria-describedby="${id}-help"
      min=${field.min} max=${field.max} step=${field.step} value=${value}
      onInput=${(event) => change(name, fit(field, event.target.value))} />`}
    ${kind === "lines" && html`<textarea ...${common} class="input" rows="2" spellcheck=${false} value=${value.join("\n")}
      onChange=${(event) => change(name, fit(field, event.target.value.split("\n")))}></textarea>`}
    <p class="help" id="${id}-help">${t(`settings.${name}.help`)}</p>
  </div>`;
}

function Choice({ label, name, options, value, onChange }) {
  return html`<fieldset class="choice">
    <legend>${label}</legend>
    <div class="segments">
      ${options.map((option) => html`<label key=${option} class="segment">
        <input type="radio" name=${name} value=${option} checked=${value === option} onChange=${() => onChange(option)} />
        <span>${t(`settings.${name}.${option}`)}</span>
      </label>`)}
    </div>
  </fieldset>`;
}

function ModelField() {
  const { models } = server.value;
  const chosen = model.value;
  const context = chosen?.context_length ?? chosen?.max_model_len;
  return html`<div class="field">
    <div class="field-head"><label for="setting-model">${t("settings.model")}</label></div>
    <select id="setting-model" class="input" value=${chosen?.id ?? ""} disabled=${!models.length} aria-describedby="setting-model-help"
      onChange=${(event) => change("model", event.target.value)}>
      ${models.length ? models.map(({ id }) => html`<option key=${id} value=${id}>${id}</option>`) : html`<option value="">—</option>`}
    </select>
    <p class="help" id="setting-model-help">${context ? t("settings.model.context", { context: number(context) }) : t("settings.model.help")}</p>
  </div>`;
}

function Data() {
  const file = useRef(null);
  const save = async () => {
    const date = new Date().toISOString().slice(0, 10);
    downloadText(await exportText(), `bimo-${date}.json`, "application/json");
  };
  const load = async (event) => {
    const [chosen] = event.target.files;
    event.target.value = ""; // the same file may be chosen again
    if (!chosen) return;
    try {
      const { added, skipped } = await importText(await chosen.text());
      notify(t("data.imported", { count: added }) + (skipped ? ` ${t("data.skipped", { count: skipped })}` : ""));
    } catch {
      notify(t("data.import.failed", { name: chosen.name }));
    }
    opened.value = false; // the toast lies under a modal dialog
  };
  const eraseAll = async () => {
    const count = summaries.value.length;
    const agreed = await confirm({ title: t("data.erase.title"), text: t("data.erase.text", { count }), action: t("data.erase") });
    if (!agreed) return;
    await stopAll();
    await eraseEverything();
    opened.value = false;
    notify(t("data.erased"));
  };
  const none = !summaries.value.length;
  return html`<section aria-labelledby="settings-data">
    <h3 id="settings-data">${t("settings.data")}</h3>
    <p class="help">${t("settings.data.help")}</p>
    <div class="row wrap">
      <button type="button" class="button" disabled=${none} onClick=${save}>${t("data.export")}</button>
      <button type="button" class="button" onClick=${() => file.current.click()}>${t("data.import")}</button>
      <button type="button" class="button danger-quiet" disabled=${none} onClick=${eraseAll}>${t("data.erase")}</button>
      <input ref=${file} type="file" accept="application/json,.json" class="offscreen" tabindex="-1" aria-hidden="true" onChange=${load} />
    </div>
  </section>`;
}

const SHORTCUTS = [["Enter", "send"], ["Shift+Enter", "line"], ["Esc", "stop"], ["Ctrl+K", "search"], ["Ctrl+Shift+O", "new"],
  ["/", "write"], ["↑", "edit"]];

function Shortcuts() {
  const apple = /Mac|iP(hone|ad)/.test(navigator.platform);
  return html`<section aria-labelledby="settings-keys">
    <h3 id="settings-keys">${t("settings.keys")}</h3>
    <dl class="shortcuts">
      ${SHORTCUTS.map(([keys, name]) => html`<div key=${name}>
        <dt>${(apple ? keys.replace("Ctrl", "⌘") : keys).split("+").map((part) => html`<kbd>${part}</kbd>`)}</dt>
        <dd>${t(`keys.${name}`)}</dd></div>`)}
    </dl>
  </section>`;
}

function Content({ close }) {
  const anyChanged = FIELDS.some(({ name }) => isChanged(name)) || isChanged("system");
  return html`
    <header class="sheet-head">
      <h2>${t("settings.title")}</h2>
      <${IconButton} name="close" label=${t("close")} onClick=${close} />
    </header>
    <div class="sheet-body">
      <section aria-labelledby="settings-answers">
        <div class="section-head">
          <h3 id="settings-answers">${t("settings.answers")}</h3>
          <button type="button" class="link-button" disabled=${!anyChanged} onClick=${() => reset()}>${t("settings.reset.all")}</button>
        </div>
        <${ModelField} />
        <div class="field">
          <div class="field-head"><label for="setting-system">${t("settings.system")}</label>
            <${ResetButton} name="system" label=${t("settings.system")} /></div>
          <textarea id="setting-system" class="input" rows="3" dir="auto" aria-describedby="setting-system-help"
            placeholder=${t("settings.system.placeholder")} value=${settings.value.system}
            onInput=${(event) => change("system", event.target.value)}></textarea>
          <p class="help" id="setting-system-help">${t("settings.system.help")}</p>
        </div>
        ${FIELDS.map((field) => html`<${Field} key=${field.name} field=${field} />`)}
      </section>
      <section aria-labelledby="settings-look">
        <h3 id="settings-look">${t("settings.look")}</h3>
        <${Choice} label=${t("settings.theme")} name="theme" options=${THEMES} value=${theme.value} onChange=${(value) => (theme.value = value)} />
        <${Choice} label=${t("settings.language")} name="language" options=${LANGUAGE_CHOICES} value=${languageChoice.value}
          onChange=${(value) => (languageChoice.value = value)} />
      </section>
      <section aria-labelledby="settings-key">
        <h3 id="settings-key">${t("settings.key")}</h3>
        <p class="help">${t(apiKey.value ? "settings.key.known" : "settings.key.help")}</p>
        ${apiKey.value
          ? html`<button type="button" class="button" onClick=${() => setApiKey("", false)}>${t("settings.key.forget")}</button>`
          : html`<${KeyForm} id="settings-key-input" />`}
      </section>
      <${Data} />
      <${Shortcuts} />
    </div>`;
}

export function SettingsPanel() {
  const dialog = useRef(null);
  const open = opened.value;
  useEffect(() => {
    if (open && !dialog.current.open) dialog.current.showModal();
    else if (!open) dialog.current.close();
  }, [open]);
  const close = () => (opened.value = false);
  const onClick = (event) => event.target === dialog.current && close(); // the backdrop is the dialog itself
  return html`<dialog ref=${dialog} class="sheet" aria-label=${t("settings.title")} onClose=${close} onClick=${onClick}>
    ${open && html`<${Content} close=${close} />`}
  </dialog>`;
}
