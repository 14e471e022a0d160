// Export, light and dark, keyboard. Runs in the browser alone.
window.chatbotExport = (left, right, context) => {
  const text = (m) => typeof m.content === "string" ? m.content : (m.content || []).map((p) => p.text || "").join("");
  const part = (name, messages) => (messages || []).length
    ? `## ${name}\n\n` + messages.map((m) => `**${m.role === "user" ? "Question" : "Answer"}:** ${text(m)}`).join("\n\n") + "\n\n" : "";
  const about = document.querySelector(".about table")?.innerText || "";
  const body = `# Conversation\n\n` + (context ? `## Context\n\n${context}\n\n` : "")
    + (right && right.length ? part("Tuned", left) + part("Base", right) : part("Answers", left)) + (about ? `## Model\n\n${about}\n` : "");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([body], { type: "text/markdown" }));
  link.download = "conversation.md";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};
window.chatbotTheme = () => {
  const dark = document.body.classList.toggle("dark");
  try { localStorage.setItem("chatbot-theme", dark ? "dark" : "light"); } catch (e) { /* private windows */ }
};
document.addEventListener("DOMContentLoaded", () => {
  try {
    const chosen = localStorage.getItem("chatbot-theme");
    if (chosen) setTimeout(() => document.body.classList.toggle("dark", chosen === "dark"), 300);
  } catch (e) { /* private windows */ }
});
document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || event.target.isContentEditable;
  if (event.key === "Escape") document.querySelector("#stop")?.click();
  if (event.key === "/" && !typing) { event.preventDefault(); document.querySelector("#box textarea")?.focus(); }
});
