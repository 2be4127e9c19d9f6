// The head of both pages: the run, the language, signing out.
import { ask } from "./api.js";
import { at, make } from "./dom.js";
import { currentLanguage, LANGUAGES, setLanguage, t } from "./words.js";

export function fillHeader(me, languageChanged) {
  at("run").textContent = t("run", { run: me.run });
  const choice = at("language");
  choice.replaceChildren(...Object.entries(LANGUAGES).map(([value, text]) => make("option", { value }, text)));
  choice.value = currentLanguage();
  choice.onchange = () => {
    setLanguage(choice.value);
    at("run").textContent = t("run", { run: me.run });
    languageChanged();
  };
  at("sign-out").title = me.name;
  at("sign-out").onclick = async () => {
    await ask("DELETE", "session");
    location.reload();
  };
}

// A link of another invitation, opened where somebody is signed in: it is its owner who is meant.
export async function signInByLink() {
  const token = location.hash.slice(1);
  if (!token || document.getElementById(token)) return; // a place on this page
  history.replaceState(null, "", location.pathname);
  await ask("POST", "session", { token });
  location.reload();
  await new Promise(() => {}); // nothing more is done here
}
