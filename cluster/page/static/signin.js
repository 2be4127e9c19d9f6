// Takes the token out of the link's fragment, which no server sees, and gives it for a cookie.
const TEXTS = {
  en: {
    about: "Open the link of your invitation, or enter the token that you were given.",
    name: "Token", enter: "Sign in", wrong: "This token is not valid (any more). Ask whoever invited you for a new link.",
    away: "The server does not answer. Try again in a moment.",
  },
  zh: {
    about: "请打开邀请链接，或输入您收到的令牌。",
    name: "令牌", enter: "登录", wrong: "令牌无效或已失效。请向邀请您的人索取新的链接。",
    away: "服务器没有响应，请稍后再试。",
  },
};
const kept = (() => { try { return localStorage.getItem("tenfold-language"); } catch { return null; } })();
const wanted = kept || document.documentElement.dataset.language || navigator.language;
const language = wanted.startsWith("zh") ? "zh" : "en";
const texts = TEXTS[language];
const at = (id) => document.getElementById(id);
document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
for (const id of ["about", "name", "enter"]) at(id).textContent = texts[id];

async function enter(token) {
  at("problem").textContent = "";
  try {
    const answer = await fetch("api/session", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ token }),
    });
    if (answer.ok) return location.reload();
    at("problem").textContent = answer.status < 500 ? texts.wrong : texts.away;
  } catch {
    at("problem").textContent = texts.away;
  }
  at("token").focus();
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  enter(at("token").value.trim());
});
addEventListener("hashchange", signInByLink);
function signInByLink() {
  const token = location.hash.slice(1);
  if (!token) return;
  history.replaceState(null, "", location.pathname); // the token stays out of the history and of screenshots
  enter(token);
}
signInByLink();
