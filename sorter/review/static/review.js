// The page of `sorter review`: a queue of photos, one in front or many at once. Each decision is sent at once and in
// order; it counts when the server has recorded it and moved the photo, and is shown again if that fails.

const labels = JSON.parse(document.body.dataset.labels); // [{label, folder, key}]
const check = Number(document.body.dataset.check); // photos of a spot check, 0 in a plain review
const AHEAD = 8; // pictures that are fetched before they are asked for
const BEHIND = 2; // and kept afterwards
const MOST = 500; // decisions in one request
const LARGE = 1600; // long sides of pictures, pixels
const THUMBNAIL = 320;
const $ = (id) => document.getElementById(id);

let view = "least-sure";
let photos = []; // cards of the view, in its order; those that are decided stay until the view changes
let at = 0; // the one in front; photos.length after the last one
let after = null; // where the last page ended, null if it was the last one
let left = 0; // photos of the view without a decision, as far as they are counted
let loading = null; // the page on its way
let many = false; // the grid is shown
let anchor = 0; // where a range of the selection begins
const given = new Map(); // by photo: the label that was given, null for neither
const steps = []; // what can be taken back: lists of {photo, before}
const selected = new Set();
const jobs = []; // requests on their way, in order
const pictures = new Map(); // large ones, by address
const tiles = new Map(); // by photo

// --- talking to the server ---

async function api(path, body) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(`api/${path}`, body === undefined ? {} : options).catch(() => null);
  if (response === null) throw new Error("sorter review does not answer: start it again and open its new address");
  const answer = await response.json().catch(() => ({ error: `sorter review answered ${response.status}` }));
  if (!response.ok && !answer.outcomes) throw new Error(answer.error);
  return answer;
}

async function load() {
  const asked = view;
  loading ??= api(`deck?${new URLSearchParams({ view, ...(after !== null && { after }) })}`);
  const page = await loading.finally(() => (loading = null));
  if (asked !== view) return;
  const known = new Set(photos.map((photo) => photo.id));
  if (view === "corrected") page.photos.forEach(({ id, said }) => given.set(id, said));
  photos.push(...page.photos.filter((photo) => !known.has(photo.id) && isOpen(photo)));
  after = page.after;
  if (view === "corrected") left = 0;
  else left = after === null ? photos.filter((photo) => !given.has(photo.id)).length : (page.left ?? left);
}

// Whether a photo is to be looked at in this view.
const isOpen = (photo) => view === "corrected" || !given.has(photo.id);

function send(path, body, step) {
  jobs.push({ path, body, step });
  if (jobs.length === 1) work();
}

async function work() {
  while (jobs.length) {
    const job = merged();
    let outcomes = [];
    try {
      ({ outcomes } = await api(job.path, job.body));
    } catch (error) {
      job.step.forEach((one) => revert(one, job.path));
      notice(error.message);
    }
    jobs.shift();
    const failed = outcomes.filter((outcome) => !settle(outcome, job));
    if (outcomes.length > failed.length) announce(job, outcomes.length);
    show();
  }
}

// Decisions that waited for the same answer go together; one on a photo that is among them already does not.
function merged() {
  const [job] = jobs;
  const isNew = ({ photo }) => !job.step.some((one) => one.photo === photo);
  while (job.path === "decide" && jobs[1]?.path === "decide" && job.body.length + jobs[1].body.length <= MOST) {
    if (!jobs[1].step.every(isNew)) break;
    const [next] = jobs.splice(1, 1);
    job.body.push(...next.body);
    job.step.push(...next.step);
  }
  return job;
}

function settle(outcome, job) {
  const one = job.step.find(({ photo }) => photo.id === outcome.photo);
  if (outcome.card) Object.assign(one.photo, outcome.card);
  if (outcome.warning) notice(`${one.photo.name}: ${outcome.warning}`);
  if (!outcome.error) return true;
  revert(one, job.path);
  notice(`${one.photo.name}: ${outcome.error}`);
  tiles.delete(one.photo.id);
  // It comes again after the one in front, so that no key meant for that one hits it; if it is gone, it does not.
  const front = photos[at];
  photos = photos.filter((photo) => photo !== one.photo || photo === front);
  at = front ? photos.indexOf(front) : photos.length;
  if (outcome.card && one.photo !== front) photos.splice(front ? at + 1 : at, 0, one.photo);
  else if (!outcome.card) {
    photos = photos.filter((photo) => photo !== one.photo);
    left -= 1;
  }
  return false;
}

function revert(one, path) {
  const { photo, before, said } = one;
  mark(photo, path === "take-back" ? said : before);
  if (path === "take-back") return steps.push([one]);
  const index = steps.findIndex((step) => step.some((one) => one.photo === photo));
  if (index >= 0) steps[index] = steps[index].filter((one) => one.photo !== photo);
}

// --- decisions ---

function mark(photo, label) {
  const was = given.has(photo.id);
  if (label === undefined) given.delete(photo.id);
  else given.set(photo.id, label);
  left += was - given.has(photo.id);
}

function chosen() {
  if (many && selected.size) return photos.filter((photo) => selected.has(photo.id));
  return at < photos.length ? [photos[at]] : [];
}

function decide(label) {
  const isConfirmed = label === undefined;
  const step = [];
  const verdicts = [];
  for (const photo of chosen()) {
    const said = isConfirmed ? photo.label : label;
    if (said === undefined || (isConfirmed && said === null)) continue;
    const before = given.get(photo.id);
    const isThere = before === undefined && photo.folder === labels.find((one) => one.label === said)?.folder;
    const how = check ? "checked" : isThere ? "confirmed" : "corrected";
    verdicts.push({ photo: photo.id, version: photo.version, label: said, how });
    step.push({ photo, before, said });
  }
  if (!step.length)
    return say(check ? "In a check the labels are hidden: say what it is." : "There is nothing to confirm.");
  notice("");
  step.forEach(({ photo, said }) => mark(photo, said));
  steps.push(step);
  selected.clear();
  for (let i = 0; i < step.length; i += MOST) send("decide", verdicts.slice(i, i + MOST), step.slice(i, i + MOST));
  advance();
}

function takeBack() {
  while (steps.length && !steps.at(-1).length) steps.pop();
  const step = steps.pop() ?? earlier();
  if (!step) return say("There is nothing to take back.");
  notice("");
  step.forEach(({ photo, before }) => mark(photo, before));
  photos.splice(at, 0, ...step.map(({ photo }) => photo).filter((photo) => !photos.includes(photo)));
  at = photos.indexOf(step[0].photo);
  for (let i = 0; i < step.length; i += MOST) {
    const some = step.slice(i, i + MOST);
    send(
      "take-back",
      some.map(({ photo }) => photo.id),
      some,
    );
  }
  show();
}

// What was decided before this page was opened can be taken back from the photo itself.
function earlier() {
  const photo = photos[at];
  return view === "corrected" && given.has(photo?.id) ? [{ photo, said: given.get(photo.id) }] : undefined;
}

function advance() {
  if (view === "corrected") return go(1);
  const next = photos.findIndex((photo, i) => i > at && !given.has(photo.id));
  if (next >= 0) at = next;
  else {
    const first = photos.findIndex((photo) => !given.has(photo.id));
    at = first < 0 || after !== null ? photos.length : first;
  }
  show();
}

// --- words ---

const percent = (share) => `${(Math.floor(share * 1000) / 10).toFixed(1)}%`;
const told = (label) => (label === null ? neither : label);
const neither = labels.length === 2 ? "neither" : "none of these";
const model = (photo) => (photo.label ? `${photo.label}, ${percent(photo.confidence)}` : "");

// What is on its way counts as left: it is not recorded yet.
function leftText() {
  const waiting = jobs.flatMap((job) =>
    job.step.map(({ before }) => (before !== undefined ? 0 : job.path === "decide" ? 1 : -1)),
  );
  const count = waiting.reduce((sum, one) => sum + one, left);
  return left >= 5000 ? "more than 5,000 left" : `${count.toLocaleString("en")} left`;
}

function describe(photo) {
  const said = given.get(photo.id);
  const parts = [];
  if (said !== undefined) parts.push(`you say ${told(said)}`);
  if (photo.label && (!check || said !== undefined)) {
    parts.push(`${photo.folder === "unsure" ? "the model is unsure" : "the model says"}: ${model(photo)}`);
  }
  if (photo.why) parts.push(photo.why);
  return parts.join("; ");
}

function say(text) {
  $("status").textContent = text;
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function announce(job, count) {
  const { photo, said } = job.step[0];
  let what = `${count} photos are decided`;
  if (job.path === "take-back") what = count === 1 ? `${photo.name}: taken back` : `${count} photos: taken back`;
  else if (count === 1 && check) what = `${photo.name}: you say ${told(said)}, the model said ${model(photo)}`;
  else if (count === 1) what = `${photo.name} is in ${photo.folder}/ now`;
  say(view === "corrected" ? `${what}.` : `${what}, ${leftText()}.`);
}

// --- what is shown ---

const address = (photo, side) => `photo/${photo.id}/${side}?version=${photo.version}`;

function picture(photo) {
  const url = address(photo, LARGE);
  if (!pictures.has(url)) {
    const image = new Image();
    image.onerror = () => explain(photo, image, url);
    image.src = url;
    pictures.set(url, image);
  }
  return pictures.get(url);
}

// A picture that does not come has a reason: the photo has changed, is gone, or cannot be decoded.
async function explain(photo, image, url) {
  const response = await fetch(url).catch(() => null);
  const { error } = (await response?.json().catch(() => null)) ?? { error: "sorter review does not answer" };
  pictures.delete(url);
  if (response?.status === 409) Object.assign(photo, await api(`card/${photo.id}`).catch(() => ({})));
  if (response?.status === 409 && address(photo, LARGE) !== url) return show();
  image.replaceWith(made("p", { textContent: `${photo.name}: ${error}.` }));
}

function prefetch() {
  const near = photos.slice(Math.max(0, at - BEHIND), at + AHEAD + 1);
  const wanted = new Set(near.map((photo) => address(photo, LARGE)));
  for (const url of pictures.keys()) if (!wanted.has(url)) pictures.delete(url);
  // To decode photos takes all processors: decisions that are on their way go first.
  const ahead = near.slice(Math.min(at, BEHIND));
  (jobs.length ? ahead.slice(0, 2) : ahead.concat(near)).forEach(picture);
}

function show() {
  const photo = photos[at];
  const isFailed = view === "failed";
  $("one").hidden = many || isFailed || !photo;
  $("grid").hidden = !many || isFailed;
  $("failed").hidden = !isFailed;
  $("more").hidden = after === null || !(many || isFailed);
  $("left").textContent = isFailed || view === "corrected" ? "" : leftText();
  $("actions").classList.toggle("idle", isFailed);
  if (many && !isFailed) showGrid();
  else if (photo && !isFailed) showOne(photo);
  showEnd(isFailed || (many ? photos.some(isOpen) || after !== null : photo));
  if (after !== null && photos.length - at < 20 && !loading && !isFailed) loadMore();
}

function showOne(photo) {
  const image = picture(photo);
  image.alt = `${photo.name}. ${describe(photo)}`;
  if ($("picture").firstChild !== image) $("picture").replaceChildren(image);
  $("name").title = photo.name;
  $("name").textContent = check ? photo.name : `${photo.folder}/${photo.name}`;
  $("said").textContent = describe(photo) || "What is it?";
  $("sure").hidden = photo.confidence === undefined || photo.confidence === null || given.has(photo.id);
  $("sure").value = photo.confidence ?? 0;
  $("one").classList.toggle("decided", given.has(photo.id));
  if (!document.activeElement?.closest("button, select, input, figure"))
    $("one").firstElementChild.focus({ preventScroll: true });
  prefetch();
}

async function showEnd(isMore) {
  $("end").hidden = Boolean(isMore);
  if (isMore) return;
  if (jobs.length) $("end").textContent = "Saving…";
  else if (after !== null) $("end").textContent = "Loading…";
  else if (!photos.length) $("end").textContent = "There is nothing to look at here.";
  else if (!check) $("end").textContent = "That was the last one: everything here is decided.";
  else
    $("end").textContent = await api("check").then(
      ({ sentence }) => sentence,
      (error) => error.message,
    );
}

function tile(photo) {
  if (tiles.has(photo.id)) return tiles.get(photo.id);
  const element = document.createElement("div");
  const image = new Image();
  const words = document.createElement("span");
  image.loading = "lazy";
  image.alt = "";
  image.onerror = () => image.replaceWith(made("em", { textContent: "cannot be shown" }));
  image.src = address(photo, THUMBNAIL);
  words.textContent = check ? photo.name : view === "corrected" ? describe(photo) : `${photo.folder === "unsure" ? "unsure: " : ""}${model(photo)}`;
  element.append(image, words);
  element.role = "option";
  element.ariaLabel = `${photo.name}. ${describe(photo)}`;
  element.onclick = (event) => select(photo, event.shiftKey);
  tiles.set(photo.id, element);
  return element;
}

function showGrid() {
  const open = photos.filter(isOpen);
  if (at >= photos.length || !isOpen(photos[at])) at = Math.max(0, photos.indexOf(open[0]));
  const shown = open.map((photo) => {
    const element = tile(photo);
    element.ariaSelected = String(selected.has(photo.id));
    element.tabIndex = photo === photos[at] ? 0 : -1;
    return element;
  });
  if (shown.length !== $("grid").childElementCount || shown.some((one, i) => one !== $("grid").children[i]))
    $("grid").replaceChildren(...shown);
  if (!document.activeElement?.closest("button, select, input")) tiles.get(photos[at]?.id)?.focus();
}

function select(photo, isRange) {
  const index = photos.indexOf(photo);
  const range = photos.slice(Math.min(anchor, index), Math.max(anchor, index) + 1);
  if (isRange) range.filter(isOpen).forEach((one) => selected.add(one.id));
  else if (!selected.delete(photo.id)) selected.add(photo.id);
  if (!isRange) anchor = index;
  at = index;
  say(`${selected.size} selected`);
  show();
}

function selectAll() {
  photos.filter(isOpen).forEach((photo) => selected.add(photo.id));
  say(`${selected.size} selected`);
  show();
}

function go(by) {
  let index = at + by;
  if (many) {
    const step = Math.sign(by);
    for (index = at; by; by -= step) {
      do index += step;
      while (photos[index] && !isOpen(photos[index]));
    }
    if (!photos[index]) return;
  }
  at = Math.max(0, Math.min(index, photos.length));
  notice("");
  show();
}

const columns = () => getComputedStyle($("grid")).gridTemplateColumns.split(" ").length;

function turnGrid() {
  many = !many;
  selected.clear();
  say("");
  document.body.classList.remove("full");
  document.activeElement?.blur();
  show();
  tiles.get(photos[at]?.id)?.scrollIntoView({ block: "nearest" });
}

function turnFull(event) {
  if (many) turnGrid();
  document.body.classList.toggle("full", event ? undefined : false);
}

function turnHelp() {
  if ($("help").open) $("help").close();
  else $("help").showModal();
}

function leave() {
  if (document.body.classList.contains("full")) return turnFull();
  selected.clear();
  show();
}

// --- keys and buttons, from one table ---

const entry = (where, more) => (keys, name, help, run) => ({ keys, name, help, run, where, ...more });
const action = entry("actions");
const walk = entry("actions", { repeats: true });
const inGrid = entry("actions", { inGrid: true });
const arrow = entry("", { inGrid: true, repeats: true });
const tool = entry("tools");

const table = [
  ...labels.map(({ label, key }) => action(key ? [key] : [], label, `It is: ${label}`, () => decide(label))),
  action(["u"], neither, "It is none of the model's classes, and goes to unsure/", () => decide(null)),
  entry(check ? "" : "actions")(["Enter", " "], "confirm", "The model is right", () => decide()),
  action(["Backspace", "Ctrl+z"], "take back", "Take the last decision back", takeBack),
  walk(["ArrowLeft", "k"], "back", "The photo before, without a decision", () => go(-1)),
  walk(["ArrowRight", "j"], "next", "The next photo, without a decision", () => go(1)),
  arrow(["ArrowUp"], "up", "In the grid: the photo above", () => go(-columns())),
  arrow(["ArrowDown"], "down", "In the grid: the photo below", () => go(columns())),
  inGrid(["x"], "select", "In the grid: select; Shift+click selects up to a photo", () => select(photos[at])),
  inGrid(["Ctrl+a"], "select all", "In the grid: select all that are loaded", selectAll),
  tool(["g"], "grid", "Many photos at once, and back to one", turnGrid),
  tool(["f"], "full size", "The photo alone, and back", turnFull),
  entry("")(["Escape"], "leave", "Leave the full size, or the selection", leave),
  tool(["?"], "help", "This table", turnHelp),
];
const SHOWN = {
  " ": "Space",
  ArrowLeft: "←",
  ArrowRight: "→",
  ArrowUp: "↑",
  ArrowDown: "↓",
  Backspace: "⌫",
  "Ctrl+z": "Ctrl+Z",
  "Ctrl+a": "Ctrl+A",
};
const TOLD = { " ": "Space", "Ctrl+z": "Control+Z", "Ctrl+a": "Control+A" }; // to screen readers

function made(tag, properties) {
  return Object.assign(document.createElement(tag), properties);
}

function button({ keys, name, run, where, inGrid }) {
  const element = made("button", { type: "button" });
  element.append(name, " ");
  if (keys.length) {
    element.append(made("kbd", { textContent: SHOWN[keys[0]] ?? keys[0], ariaHidden: "true" }));
    element.setAttribute("aria-keyshortcuts", keys.map((key) => TOLD[key] ?? key).join(" "));
  }
  element.classList.toggle("in-grid", Boolean(inGrid));
  element.onclick = (event) => {
    if (event.detail) element.blur(); // Enter after a click means the next photo, not the button again
    run(event);
  };
  $(where).append(element);
}

for (const one of table) {
  const row = $("help").querySelector("table").insertRow();
  const keys = one.keys.flatMap((key) => [made("kbd", { textContent: SHOWN[key] ?? key }), " "]);
  row.insertCell().append(...keys);
  row.insertCell().textContent = one.help;
  if (one.where) button(one);
}

function onKey(event) {
  const control = event.ctrlKey || event.metaKey;
  const name = (control ? "Ctrl+" : "") + (event.key.length === 1 ? event.key.toLowerCase() : event.key);
  const entry = table.find((one) => one.keys.includes(name));
  const isPlain = !control && !event.key.startsWith("Arrow") && event.key !== "Escape";
  if (!entry || event.altKey || event.isComposing || (entry.inGrid && !many) || (isPlain && !$("keys").checked)) return;
  if ($("help").open && event.key !== "?") return;
  if (event.target.closest("select, input:not([type=checkbox])")) return;
  if ((event.key === "Enter" || event.key === " ") && event.target.closest("button, input")) return;
  if (view === "failed" && entry.where === "actions") return;
  event.preventDefault();
  if (!event.repeat || entry.repeats) entry.run(event);
}

// --- views ---

async function open() {
  $("day").value ||= new Date().toLocaleDateString("sv"); // as ISO 8601 has it
  view = $("view").value === "day" ? `day:${$("day").value}` : $("view").value;
  $("day").hidden = $("view").value !== "day";
  photos = [];
  at = left = 0;
  after = loading = null;
  selected.clear();
  tiles.clear();
  notice("");
  try {
    if (view === "failed") await loadFailed(true);
    else await load();
    show();
  } catch (error) {
    notice(error.message);
  }
}

async function loadFailed(isFirst) {
  const page = await api(`failed${isFirst ? "" : `?after=${encodeURIComponent(after)}`}`);
  after = page.after;
  const lines = page.photos.map(({ name, why }) => made("li", { textContent: `${name} (${why})` }));
  const list = $("failed").firstElementChild;
  list.replaceChildren(...(isFirst ? [] : list.children), ...lines);
}

async function loadMore() {
  try {
    await (view === "failed" ? loadFailed() : load());
    show();
  } catch (error) {
    notice(error.message);
  }
}

async function start() {
  const option = (value, text) => $("view").append(new Option(text, value));
  const { folders, runs } = await api("views");
  option("least-sure", "unsure first, then the least sure");
  folders.forEach((folder) => option(`folder:${folder}`, `${folder}/, the least sure first`));
  option("newest", "the newest first");
  option("day", "one day");
  option("corrected", "what was corrected, the last one first");
  const when = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "short" });
  runs.forEach(({ id, started }) => option(`run:${id}`, `the run of ${when.format(started * 1000)}`));
  option("failed", "failed/, as a list");
  await open();
}

try {
  $("keys").checked = localStorage.getItem("keys") !== "off";
  $("keys").onchange = () => localStorage.setItem("keys", $("keys").checked ? "on" : "off");
} catch {
  // This browser remembers nothing.
}
$("view").onchange = $("day").onchange = () => {
  $("view").blur();
  open();
};
$("more").onclick = loadMore;
new IntersectionObserver(([entry]) => entry.isIntersecting && many && !loading && loadMore(), {
  rootMargin: "600px",
}).observe($("more"));
document.addEventListener("keydown", onKey);
addEventListener("beforeunload", (event) => jobs.length && event.preventDefault());
start().catch((error) => notice(error.message));
