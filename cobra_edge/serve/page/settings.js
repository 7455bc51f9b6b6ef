// Settings, stored in this tab. Empty fields are not sent, so that the server's defaults apply.

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const STORAGE_KEY = "cobra-edge.settings";
const byId = (id) => document.getElementById(id);

/** Set up the settings and the API key dialog; `reveal` shows the settings. */
export function makeSettings(reveal) {
  const form = byId("settings-form");
  const fields = [...NUMBERS, "key"].map((name) => form.elements.namedItem(name));
  for (const field of fields) field.value = stored()[field.name] ?? "";
  form.addEventListener("input", keep);
  form.addEventListener("submit", (event) => event.preventDefault());

  function keep() {
    try {
      sessionStorage.setItem(STORAGE_KEY, JSON.stringify(Object.fromEntries(fields.map(({ name, value }) => [name, value]))));
    } catch {
      // storage is disabled: settings last until the page is closed
    }
  }

  return {
    key: () => byId("key").value.trim(),
    /** The settings as fields of a request. */
    sampling: () => Object.fromEntries(NUMBERS.filter((name) => byId(name).value !== "").map((name) => [name, byId(name).valueAsNumber])),
    /** Whether all are valid; the browser reports those that are not. */
    valid() {
      if (form.checkValidity()) return true;
      reveal();
      byId("settings").open = true;
      return form.reportValidity();
    },
    /** Ask for the API key; true if one was entered. */
    async askForKey(words) {
      if (!(await keyFromDialog(words))) return false;
      byId("key").value = byId("ask-key-field").value;
      keep();
      return true;
    },
  };
}

function keyFromDialog(words) {
  const dialog = byId("ask-key");
  if (dialog.open) return Promise.resolve(false);
  byId("ask-key-words").textContent = words;
  byId("ask-key-field").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  byId("ask-key-close").onclick = () => dialog.close();
  byId("ask-key-form").onsubmit = (event) => {
    event.preventDefault();
    dialog.close("entered");
  };
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "entered"), { once: true }));
}

function stored() {
  try {
    return JSON.parse(sessionStorage.getItem(STORAGE_KEY)) ?? {};
  } catch {
    return {};
  }
}
