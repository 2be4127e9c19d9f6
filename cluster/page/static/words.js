// What the page says, in the language that was chosen; else in the server's; else in the browser's.
import { en } from "./words-en.js";
import { zh } from "./words-zh.js";

const TABLES = { en, zh };
const KEY = "tenfold-language";
export const LANGUAGES = { en: "English", zh: "中文" };
let language = "en";

export function chooseLanguage(fromServer) {
  const wanted = recall() || fromServer || navigator.language || "en";
  setLanguage(wanted.startsWith("zh") ? "zh" : "en", false);
}

export function setLanguage(name, keep = true) {
  language = name;
  document.documentElement.lang = name === "zh" ? "zh-Hans" : "en";
  if (keep) {
    try { localStorage.setItem(KEY, name); } catch { /* it is asked for again next time */ }
  }
  document.title = `${t(document.body.dataset.title ?? "title")} · Tenfold`;
  for (const element of document.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of document.querySelectorAll("[data-t-label]")) {
    element.setAttribute("aria-label", t(element.dataset.tLabel));
    if (element.tagName === "BUTTON") element.title = t(element.dataset.tLabel);
  }
}

export const currentLanguage = () => language;

// The text of a key, with {name} replaced by the value of that name.
export function t(key, values = {}) {
  const text = TABLES[language][key] ?? TABLES.en[key];
  if (text === undefined) throw new Error(`no text ${key}`);
  return text.replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}

export function duration(ms) {
  const minutes = Math.floor(ms / 60000);
  if (minutes < 1) return t("seconds", { n: Math.floor(ms / 1000) });
  if (minutes < 10) return t("minutes_seconds", { n: minutes, s: Math.floor(ms / 1000) % 60 });
  return minutes < 60 ? t("minutes", { n: minutes }) : t("hours", { h: Math.floor(minutes / 60), n: minutes % 60 });
}

export function moment(iso) {
  return iso ? new Date(iso).toLocaleString(document.documentElement.lang) : "–";
}

function recall() {
  try { return localStorage.getItem(KEY); } catch { return null; }
}
