// Settings, kept in this tab alone; what is left empty is not sent, so the server decides it.

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const KEPT = "cobra-edge.settings";
const byId = (id) => document.getElementById(id);

/** Make the settings and the window that asks for a key work; `reveal` brings the settings into sight. */
export function makeSettings(reveal) {
  const form = byId("settings-form");
  const fields = [...NUMBERS, "key"].map((name) => form.elements.namedItem(name));
  for (const field of fields) field.value = stored()[field.name] ?? "";
  form.addEventListener("input", keep);
  form.addEventListener("submit", (event) => event.preventDefault());

  function keep() {
    try {
      sessionStorage.setItem(KEPT, JSON.stringify(Object.fromEntries(fields.map(({ name, value }) => [name, value]))));
    } catch {
      // forbidden by the browser's settings: they last until the page is left
    }
  }

  return {
    key: () => byId("key").value.trim(),
    /** The fields of a request that were set, as numbers. */
    sampling: () => Object.fromEntries(NUMBERS.filter((name) => byId(name).value !== "").map((name) => [name, byId(name).valueAsNumber])),
    /** Whether all can be sent; says in the browser's words what cannot. */
    valid() {
      if (form.checkValidity()) return true;
      reveal();
      byId("settings").open = true;
      return form.reportValidity();
    },
    /** Ask for the key; true where one was given. */
    async askForKey(words) {
      if (!(await keyFromWindow(words))) return false;
      byId("key").value = byId("ask-key-field").value;
      keep();
      return true;
    },
  };
}

function keyFromWindow(words) {
  const dialog = byId("ask-key");
  if (dialog.open) return Promise.resolve(false);
  byId("ask-key-words").textContent = words;
  byId("ask-key-field").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  byId("ask-key-close").onclick = () => dialog.close();
  byId("ask-key-form").onsubmit = (event) => {
    event.preventDefault();
    dialog.close("given");
  };
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "given"), { once: true }));
}

function stored() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}
