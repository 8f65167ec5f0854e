// The search page: state in the address, answers from the API beside it, nothing from elsewhere.
// Text reaches the document through textContent alone. Images that are searched by are not in the address: they stay here.

const IMAGE_WEIGHTS = [["1", "once"], ["2", "twice"], ["0.5", "half"], ["-0.35", "against"]]
const PAGE = 36, SLOW = 4000, SHOW_PROGRESS = 250
const find = (id) => document.getElementById(id)
const grid = find("grid"), words = find("words"), viewer = find("viewer"), status = find("status")

let state = read_address()
let pictures = [] // that are searched by: file (a File or Blob), url (of its thumbnail), weight
let hits = [], more = false, loading = null, shown = -1, close_count = null, note = "", total = null
let fields = [], changes = false

// --- the address -----------------------------------------------------------------------------------------------------

function read_address() {
  const given = new URLSearchParams(location.search)
  return {
    q: given.get("q") ?? "", like: given.getAll("like"), unlike: given.getAll("unlike"), where: given.getAll("where"),
    only_close: given.get("only_close") === "true", show: given.get("show"),
  }
}

function address(changed) {
  const given = new URLSearchParams()
  if (changed.q) given.set("q", changed.q)
  for (const name of ["like", "unlike", "where"]) for (const value of changed[name]) given.append(name, value)
  if (changed.only_close) given.set("only_close", "true")
  if (changed.show) given.set("show", changed.show)
  const text = given.toString()
  return text ? `?${text}` : location.pathname
}

function go(change) { // to another search
  state = { ...state, show: null, ...change }
  history.pushState(null, "", address(state))
  start()
}

addEventListener("popstate", () => {
  const before = state
  state = read_address()
  const same = ["q", "like", "unlike", "where", "only_close"].every((name) => String(before[name]) === String(state[name]))
  if (!same) start()
  else if (state.show === null && viewer.open) viewer.close()
  else open_shown()
})

// --- asking ----------------------------------------------------------------------------------------------------------

const has_words = () => Boolean(state.q.trim())
const has_query = () => has_words() || Boolean(pictures.length || state.like.length || state.unlike.length)
const has_words_to_find = () => [...state.q.matchAll(TERM)].some(([, minus, , , weight]) => !minus && !/^[-−]/.test(weight ?? ""))
const are_weighed = () => has_words() || pictures.length > 1 // alone, a picture has nothing to be weighed against

async function ask(path, options = {}) {
  const reply = await fetch(path, options).catch((error) => {
    if (error.name === "AbortError") throw error
    throw new Error("The server does not answer. Is clasp serve still running?")
  })
  const body = await reply.json().catch(() => ({}))
  if (reply.status === 401) location.reload()
  if (!reply.ok) throw Object.assign(new Error(body.error ?? `The server answered ${reply.status}.`), { status: reply.status, wait: Number(reply.headers.get("retry-after")) })
  return body
}

async function ask_patiently(path, options) { // a busy server names the seconds to wait
  for (let tries = 0; ; tries++) {
    try { return await ask(path, options) } catch (error) {
      if (error.status !== 429 || tries === 3) throw error
      await new Promise((done) => setTimeout(done, 1000 * (error.wait || 1)))
    }
  }
}

function request(offset, signal) {
  const given = new URLSearchParams({ k: PAGE, offset })
  for (const value of state.where) given.append("where", value)
  if (!has_query()) return ask_patiently(`api/browse?${given}`, { signal })
  if (has_words()) given.set("q", state.q)
  if (has_words_to_find() && state.only_close) given.set("only_close", "true")
  for (const name of ["like", "unlike"]) for (const value of state[name]) given.append(name, value)
  if (!pictures.length) return ask_patiently(`api/search?${given}`, { signal })
  const form = new FormData()
  for (const [name, value] of given) form.append(name, value)
  for (const { file, weight } of pictures) {
    form.append("image", file, "image")
    if (are_weighed()) form.append("image_weight", weight)
  }
  return ask_patiently("api/search", { method: "POST", body: form, signal })
}

function start() {
  loading?.abort()
  loading = null
  hits = []; more = false; close_count = null; note = ""; total = null; shown = -1
  grid.replaceChildren()
  words.value = state.q
  document.title = state.q ? `${state.q} · clasp` : "clasp"
  find("hint").hidden = has_query()
  show_message("")
  draw_chips()
  scrollTo(0, 0)
  load_more()
}

async function load_more() {
  if (loading) return
  const control = loading = new AbortController()
  const progress = setTimeout(() => { find("progress").hidden = false }, SHOW_PROGRESS)
  const slow = setTimeout(() => { status.textContent = "Still searching; the server is slow to answer…" }, SLOW)
  try {
    const body = await request(hits.length, control.signal)
    if (loading !== control) return
    const first = hits.length
    hits.push(...(body.hits ?? body.entries))
    more = body.more
    total = body.total ?? null
    if (first === 0) note = body.note ?? ""
    close_count = body.close_count ?? null
    draw(first)
    announce()
    if (first === 0) open_shown()
  } catch (error) {
    if (error.name === "AbortError") return
    more = false
    status.textContent = ""
    show_message(error.message, true, error.status !== 400 && error.status !== 422)
  } finally {
    clearTimeout(progress)
    clearTimeout(slow)
    if (loading === control) { loading = null; find("progress").hidden = true; fill() }
  }
}

function announce() {
  if (!hits.length) {
    status.textContent = ""
    const none = state.where.length ? "No picture passes these filters." : "There is nothing to show."
    return show_message(close_count === 0 && note ? note : none)
  }
  const count = total !== null ? `${total.toLocaleString()} pictures` : more ? `The first ${hits.length.toLocaleString()} hits` : hits.length === 1 ? "1 hit" : `${hits.length.toLocaleString()} hits`
  status.textContent = count
  if (close_count === 0) status.append(element("span", { className: "unseen", textContent: `; ${note}` })) // seen as the line
}

function show_message(text, failed = false, again = false) {
  find("message").hidden = !text
  find("message").classList.toggle("error", failed)
  find("message-text").textContent = text
  find("retry").hidden = !again
  find("all").hidden = !text || again
}

// --- drawing ---------------------------------------------------------------------------------------------------------

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) {
    if (name in made && name !== "list") made[name] = value
    else made.setAttribute(name, value)
  }
  made.append(...children)
  return made
}

function icon(name) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "svg")
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use")
  use.setAttribute("href", `#i-${name}`)
  made.setAttribute("aria-hidden", "true")
  made.append(use)
  return made
}

const title_of = (hit) => hit.captions[0] || hit.name.split(/[/\\]/).pop()

function draw(first) {
  for (let place = first; place < hits.length; place++) {
    if (place === close_count) grid.append(below_line())
    grid.append(tile(hits[place], place))
  }
}

function below_line() {
  const text = close_count === 0 ? note : "Below this line nothing is close"
  return element("p", { className: "below", role: "note" }, element("span", { textContent: text }))
}

function tile(hit, place) {
  const image = element("img", { alt: "", loading: "lazy", decoding: "async" })
  image.addEventListener("load", () => image.classList.add("shown"))
  const score = hit.score === undefined ? "" : hit.score.toFixed(2)
  const copies = hit.duplicates?.length ?? 0
  const label = [title_of(hit), score && `cosine ${score}`, copies && `${copies} more nearly the same`].filter(Boolean).join(", ")
  const open = element("button", { className: "tile", type: "button", "aria-label": label }, image)
  image.addEventListener("error", () => open.classList.add("lost"))
  image.src = hit.thumbnail
  open.addEventListener("click", () => show(place))
  const figure = element("figure", { className: close_count !== null && place >= close_count ? "far" : "" }, open)
  figure.dataset.place = place
  if (copies) figure.append(element("span", { className: "copies", textContent: `+${copies}`, title: `${copies} more, nearly the same` }))
  figure.append(element("span", { className: "marks" }, mark(hit, "like", "plus", "More like this"), mark(hit, "unlike", "minus", "Less like this")))
  const z = hit.z == null ? "" : `z ${hit.z.toFixed(1)}: standard deviations above what captions of other things score`
  const caption = element("figcaption", {}, element("span", { className: "title", textContent: title_of(hit), dir: "auto" }))
  if (score) caption.append(element("span", { className: "score", textContent: score, title: `cosine similarity; ${z}` }))
  figure.append(caption)
  return figure
}

function mark(hit, kind, symbol, label) {
  const pressed = state[kind].includes(hit.id)
  const made = element("button", { className: "mark", type: "button", title: label, "aria-label": `${label}: ${title_of(hit)}`, "aria-pressed": String(pressed) }, icon(symbol))
  made.dataset.kind = kind
  made.addEventListener("click", () => feedback(hit, kind))
  return made
}

function feedback(hit, kind) {
  const other = kind === "like" ? "unlike" : "like"
  const had = state[kind].includes(hit.id)
  thumbnails.set(hit.id, hit.thumbnail)
  go({ [kind]: had ? state[kind].filter((id) => id !== hit.id) : [...state[kind], hit.id], [other]: state[other].filter((id) => id !== hit.id) })
}

const thumbnails = new Map()
const TERM = /([-−](?=[^\s\-−]))?(?:"([^"]*)"|(\^\S*|[^\s^]+))(?:\^(\S*))?/g // as _TERM of clasp/search/query.py
const NUMBER = /^[-+−]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?$/i

function draw_chips() {
  const chips = []
  for (const term of state.q.matchAll(TERM)) {
    const [typed, minus, quoted, bare, weight] = term
    const less = Boolean(minus) || /^[-−]/.test(weight ?? "")
    if (weight === undefined ? !minus : !NUMBER.test(weight)) continue // the server says what is wrong with a weight
    const text = (less ? "without " : "") + (quoted ?? bare) + (weight ? ` × ${weight.replace(/^[-−+]/, "")}` : "")
    const rest = state.q.slice(0, term.index).trimEnd() + state.q.slice(term.index + typed.length)
    chips.push(chip(text, less ? "minus" : "", () => go({ q: rest.replace(/\s+/g, " ").trim() })))
  }
  for (const kind of ["like", "unlike"]) for (const id of state[kind]) {
    const remove = () => go({ [kind]: state[kind].filter((each) => each !== id) })
    chips.push(chip(kind === "like" ? "like this" : "unlike this", kind === "like" ? "" : "minus", remove, thumbnails.get(id) ?? `api/thumbnail?id=${encodeURIComponent(id)}`))
  }
  chips.push(...pictures.map(picture_chip))
  if (pictures.length && changes) {
    const these = pictures.length > 1 ? "these pictures" : "this picture"
    const add = element("button", { type: "button", textContent: `Add ${these} to the collection` })
    add.addEventListener("click", add_pictures)
    chips.push(element("li", { className: "chip act" }, add))
  }
  for (const condition of state.where) {
    chips.push(chip(condition, "", () => go({ where: state.where.filter((each) => each !== condition) })))
  }
  const focused = document.activeElement
  const place = [...find("chips").children].findIndex((each) => each.contains(focused))
  find("chips").replaceChildren(...chips)
  if (place >= 0) (chips[Math.min(place, chips.length - 1)]?.querySelector(focused.tagName) ?? words).focus() // whose chip was drawn anew
  find("only-close").hidden = !has_words_to_find()
  find("only-close").setAttribute("aria-pressed", String(state.only_close))
}

function picture_chip(picture, place) {
  const name = pictures.length > 1 ? `image ${place + 1}` : "the image"
  const made = chip("", `picture ${picture.weight < 0 && are_weighed() ? "minus" : ""}`, () => { forget(picture); go({}) }, picture.url)
  made.querySelector("button").setAttribute("aria-label", `Remove ${name}`)
  made.querySelector("img").alt = `${name} you search by`
  if (!are_weighed()) return made
  const weights = element("select", {}, ...IMAGE_WEIGHTS.map(([value, text]) => element("option", { value, textContent: text })))
  weights.value = picture.weight
  weights.addEventListener("change", () => { picture.weight = weights.value; start() })
  made.querySelector("span").replaceWith(element("label", {}, `${name[0].toUpperCase()}${name.slice(1)} counts `, weights))
  return made
}

function chip(text, kind, remove, image) {
  const off = element("button", { type: "button", "aria-label": `Remove: ${text}` }, icon("close"))
  off.addEventListener("click", remove)
  const made = element("li", { className: `chip ${kind}` }, ...(image ? [element("img", { src: image, alt: "" })] : []), element("span", { textContent: text, dir: "auto" }), off)
  return made
}

// --- the large view --------------------------------------------------------------------------------------------------

function show(place) {
  state.show = hits[place].id
  history.pushState(null, "", address(state))
  view(place)
}

function open_shown() {
  const place = hits.findIndex((hit) => hit.id === state.show)
  if (place >= 0) view(place)
}

function view(place) {
  shown = place
  const hit = hits[place]
  const image = find("viewer-image")
  image.src = hit.thumbnail // at once, until the original is there
  const full = new Image()
  full.addEventListener("load", () => { if (hits[shown] === hit) image.src = full.src })
  full.src = hit.image
  image.alt = title_of(hit)
  find("viewer-name").textContent = hit.name.split(/[/\\]/).pop()
  find("viewer-captions").textContent = hit.captions.slice(0, 8).join("\n")
  const facts = [["path", hit.name], ["cosine", hit.score?.toFixed(3)], ["z", hit.z?.toFixed(1)], ...Object.entries(hit.meta)]
  find("viewer-facts").replaceChildren(...facts.filter(([, value]) => value !== undefined && value !== null).flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value, dir: "auto" })]))
  for (const kind of ["like", "unlike"]) find(`viewer-${kind}`).setAttribute("aria-pressed", String(state[kind].includes(hit.id)))
  find("previous").disabled = place === 0
  find("next").disabled = place === hits.length - 1 && !more
  const copies = hit.duplicates ?? []
  find("copies-part").hidden = !copies.length
  find("copies").replaceChildren(...copies.map(strip_tile))
  find("viewer-delete").hidden = !changes
  explain(hit)
  neighbours(hit)
  if (!viewer.open) viewer.showModal()
}

async function explain(hit) { // an uploaded image is not among the parts: it is not sent again
  find("why-part").hidden = true
  const given = new URLSearchParams({ id: hit.id, k: 5 })
  if (state.q.trim()) given.set("q", state.q)
  for (const name of ["like", "unlike"]) for (const value of state[name]) given.append(name, value)
  const why = await ask(`api/explain?${given}`).catch(() => null)
  if (!why || hits[shown] !== hit) return
  const rows = [
    ...why.parts.filter((part) => part.kind === "text").map((part) => ({ ...part, name: part.weight < 0 ? `without ${part.value}` : part.value, own: true })),
    ...why.captions.map((caption) => ({ ...caption, name: caption.english, title: caption.text === caption.english ? "" : caption.text })),
  ].sort((one, two) => two.score - one.score)
  find("why-title").textContent = rows.some((row) => row.own) ? "Why this is a hit: your words among the nearest captions" : "Nearest captions"
  find("why").replaceChildren(...rows.flatMap((row) => [
    element("dt", { textContent: row.name, title: row.title ?? "", className: row.own ? "best" : "", dir: "auto" }),
    element("dd", { textContent: row.score.toFixed(2), title: `cosine similarity; z ${row.z.toFixed(1)}` }),
  ]))
  find("why-part").hidden = false
}

async function neighbours(hit) {
  find("neighbours").replaceChildren()
  const body = await ask(`api/similar?${new URLSearchParams({ id: hit.id, k: 7 })}`).catch(() => ({ hits: [] }))
  if (hits[shown] !== hit) return
  find("neighbours").replaceChildren(...body.hits.filter((each) => each.id !== hit.id).slice(0, 6).map(strip_tile))
}

function strip_tile(hit) {
  const made = element("button", { type: "button", title: hit.name, "aria-label": `More like ${title_of(hit)}` }, element("img", { src: hit.thumbnail, alt: "" }))
  made.addEventListener("click", () => more_like(hit))
  return made
}

function more_like(hit) {
  thumbnails.set(hit.id, hit.thumbnail)
  if (viewer.open) leave_viewer()
  pictures.forEach(forget)
  go({ q: "", like: [hit.id], unlike: [] })
}

async function step(by) {
  if (shown + by === hits.length && more) await load_more()
  if (!hits[shown + by]) return
  state.show = hits[shown + by].id
  history.replaceState(null, "", address(state))
  view(shown + by)
}

function leave_viewer() {
  viewer.close()
}

viewer.addEventListener("close", () => {
  if (state.show !== null) { state.show = null; history.replaceState(null, "", address(state)) }
  grid.querySelector(`[data-place="${shown}"] .tile`)?.focus()
})
viewer.addEventListener("click", (event) => { if (event.target === viewer || event.target.className === "stage") leave_viewer() })
viewer.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") { event.preventDefault(); step(event.key === "ArrowLeft" ? -1 : 1) }
})
find("viewer-delete").addEventListener("click", async () => {
  const hit = hits[shown], name = hit.name.split(/[/\\]/).pop()
  if (!confirm(`Remove ${name} from the index? A file that was added here is deleted, any other stays.`)) return
  leave_viewer()
  try {
    await ask_patiently(`api/image?${new URLSearchParams({ id: hit.id })}`, { method: "DELETE" })
    const kept = (id) => id !== hit.id
    go({ like: state.like.filter(kept), unlike: state.unlike.filter(kept) })
  } catch (error) { show_message(error.message, true) }
})
find("close").addEventListener("click", leave_viewer)
find("previous").addEventListener("click", () => step(-1))
find("next").addEventListener("click", () => step(1))
find("viewer-similar").addEventListener("click", () => more_like(hits[shown]))
for (const kind of ["like", "unlike"]) find(`viewer-${kind}`).addEventListener("click", () => { const hit = hits[shown]; leave_viewer(); feedback(hit, kind) })

// --- words, pictures, filters ----------------------------------------------------------------------------------------

find("form").addEventListener("submit", (event) => {
  event.preventDefault()
  go({ q: words.value.trim() })
})

function pick(files) {
  if (!files.length) return
  const other = files.find((file) => !file.type.startsWith("image/"))
  if (other) return show_message(`${other.name || "What was dropped"} is no picture.`, true)
  pictures.push(...files.map((file) => ({ file, url: URL.createObjectURL(file), weight: "1" })))
  go({ q: words.value.trim() })
}

function forget(picture) {
  pictures = pictures.filter((each) => each !== picture)
  URL.revokeObjectURL(picture.url)
}

async function add_pictures() {
  const form = new FormData()
  for (const { file } of pictures) form.append("images", file, file.name ?? "image")
  try {
    await ask_patiently("api/images", { method: "POST", body: form })
    go({})
  } catch (error) { show_message(error.message, true) }
}

find("file").addEventListener("change", (event) => {
  pick([...event.target.files])
  event.target.value = "" // so that the same file can be chosen again
})
addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files].filter((each) => each.type.startsWith("image/"))
  if (files.length) { event.preventDefault(); pick(files) }
})
let over = 0
addEventListener("dragenter", (event) => { if (event.dataTransfer.types.includes("Files")) { over++; find("drop").classList.add("over") } })
addEventListener("dragleave", () => { over = Math.max(0, over - 1); if (!over) find("drop").classList.remove("over") })
addEventListener("dragover", (event) => event.preventDefault())
addEventListener("drop", (event) => {
  event.preventDefault()
  over = 0
  find("drop").classList.remove("over")
  pick([...event.dataTransfer.files])
})

const EXAMPLES = { date: "2024-07-31", bytes: "1000000", width: "1920", height: "1080", language: "en" }
find("filter-field").addEventListener("change", suggest_values)
function suggest_values() {
  const values = fields.find((each) => each.name === find("filter-field").value)?.values ?? {}
  find("filter-value").placeholder = EXAMPLES[find("filter-field").value] ?? ""
  find("filter-values").replaceChildren(...Object.entries(values).map(([value, count]) => element("option", { value, label: `${value} (${count})` })))
}
find("filter-form").addEventListener("submit", (event) => {
  event.preventDefault()
  const condition = find("filter-field").value + find("filter-operator").value + find("filter-value").value.trim()
  find("filters").open = false
  find("filter-value").value = ""
  if (!state.where.includes(condition)) go({ where: [...state.where, condition] })
})

async function describe() {
  const info = await ask_patiently("api/info").catch(() => null)
  if (!info) return
  find("run").textContent = info.run
  fields = info.fields
  changes = info.changes
  draw_chips()
  find("filter-field").replaceChildren(...fields.map((each) => element("option", { value: each.name, textContent: each.name })))
  suggest_values()
}

// --- keyboard, scrolling ---------------------------------------------------------------------------------------------

const columns = () => getComputedStyle(grid).gridTemplateColumns.split(" ").length
addEventListener("keydown", (event) => {
  if (viewer.open || event.ctrlKey || event.metaKey || event.altKey) return
  const typing = event.target.matches("input, select, textarea")
  if (event.key === "/" && !typing) { event.preventDefault(); words.focus(); words.select(); return }
  if (event.key === "Escape" && find("filters").open) { find("filters").open = false; find("filters").firstElementChild.focus(); return }
  if (event.target === words && event.key === "ArrowDown") { event.preventDefault(); grid.querySelector(".tile")?.focus(); return }
  const figure = event.target.closest("figure")
  if (!figure) return
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() }[event.key]
  if (by !== undefined) {
    const next = grid.querySelector(`[data-place="${Number(figure.dataset.place) + by}"] .tile`)
    event.preventDefault()
    next ? next.focus() : by < 0 && words.focus()
  }
  if (event.key === "l" || event.key === "u") feedback(hits[Number(figure.dataset.place)], event.key === "l" ? "like" : "unlike")
})

find("only-close").addEventListener("click", () => go({ only_close: !state.only_close }))
find("retry").addEventListener("click", () => (hits.length ? (show_message(""), load_more()) : start()))
const near = () => find("end").getBoundingClientRect().top < innerHeight + 900
function fill() { if (more && near()) load_more() }
new IntersectionObserver(fill, { rootMargin: "900px" }).observe(find("end"))

describe()
start()
