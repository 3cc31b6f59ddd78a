// The study's page: which sample the cards show, and the next-token distribution as the sliders reweight it.
"use strict";
const $ = (name) => document.getElementById(name);

// The cards: one text of each setting at a time.
for (const button of document.querySelectorAll("button.text"))
  button.addEventListener("click", () => {
    for (const card of document.querySelectorAll(".card [data-text]"))
      card.hidden = card.dataset.text !== button.dataset.text;
    for (const other of document.querySelectorAll("button.text"))
      other.setAttribute("aria-pressed", other === button);
  });

// The distribution. PASSAGE.places[t] = [ids, milli-nats], the likeliest first; the token that came is among them.
const T = $("temperature"), P = $("top_p"), M = $("min_p"), BARS = 18, LEVELS = 12;
const visible = (text) => text.replace(/ /g, "\u2423").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5") || "\u2205";
let chosen = PASSAGE.start;

// temperature, top_p, min_p, in this order, as the sampler does.
function reweighted([ids, cost], t, topP, minP) {
  const scaled = cost.map((c) => (t > 0 ? Math.exp(-(c - cost[0]) / 1000 / t) : 0));
  if (t === 0) scaled[0] = 1;
  const whole = scaled.reduce((a, b) => a + b, 0);
  let mass = 0, left = 0;
  const p = scaled.map((s) => {
    const q = s / whole, kept = (mass < topP || topP >= 1) && s >= minP && q > 0; // the likeliest has s = 1
    mass += q;
    left += kept ? q : 0;
    return kept ? q : 0;
  });
  return p.map((q) => q / left);
}
const entropy = (p) => p.reduce((sum, q) => sum - (q > 0 ? q * Math.log(q) : 0), 0);

const letters = PASSAGE.pieces.map((piece, i) => {
  const span = document.createElement("span");
  span.textContent = piece;
  span.addEventListener("click", () => { chosen = i; show(); });
  $("passage").append(span);
  return span;
});

const rows = Array.from({ length: BARS }, () => {
  const row = document.createElement("div");
  row.className = "bar";
  row.innerHTML = "<b></b><div><i></i><u></u></div><em></em>";
  $("bars").append(row);
  return row;
});

function show() {
  const t = +T.value, topP = +P.value, minP = +M.value;
  $("temperature_now").value = t.toFixed(2);
  $("top_p_now").value = topP.toFixed(2);
  $("min_p_now").value = minP.toFixed(2);

  // The whole passage, at these settings.
  let nats = 0, impossible = 0, spread = 0;
  PASSAGE.places.forEach((place, i) => {
    const p = reweighted(place, t, topP, minP), came = p[place[0].indexOf(PASSAGE.tokens[i])];
    spread += entropy(p);
    if (came > 0) nats -= Math.log(came); else impossible += 1;
    const level = came > 0 ? Math.min(LEVELS, Math.round((LEVELS * -Math.log(came)) / PASSAGE.top)) : LEVELS;
    letters[i].className = [
      level ? "hot" + level : "", PASSAGE.pieces[i].startsWith("\n") ? "newline" : "", i === chosen ? "chosen" : "",
    ].join(" ");
  });
  const count = PASSAGE.places.length;
  $("all_loss").textContent = impossible ? "infinite" : (nats / count).toFixed(3);
  $("all_entropy").textContent = (spread / count).toFixed(3);
  $("all_impossible").textContent = impossible;

  // The chosen place.
  const place = PASSAGE.places[chosen], came = place[0].indexOf(PASSAGE.tokens[chosen]);
  const model = reweighted(place, 1, 1, 0), p = reweighted(place, t, topP, minP);
  $("entropy").textContent = entropy(p).toFixed(3);
  $("entropy_model").textContent = entropy(model).toFixed(3);
  $("kept").textContent = p.filter((q) => q > 0).length;
  $("mass").textContent = ((100 * model.reduce((sum, q, i) => sum + (p[i] > 0 ? q : 0), 0)).toFixed(1)) + " %";
  $("before").textContent = PASSAGE.pieces.slice(Math.max(0, chosen - 24), chosen).map(visible).join("") || "(the start)";
  const most = Math.max(model[0], ...p), scale = most > 0.5 ? 1 : most > 0.25 ? 0.5 : 0.25;
  rows.forEach((row, i) => {
    // The last bar is that of the token that came, where it is not among the first.
    const k = i === BARS - 1 && came >= BARS ? came : i;
    row.hidden = k >= place[0].length;
    if (row.hidden) return;
    const [name, bars, number] = row.children;
    name.textContent = visible(PASSAGE.vocabulary[place[0][k]]);
    bars.children[0].style.width = (100 * p[k]) / scale + "%";
    bars.children[1].style.width = (100 * model[k]) / scale + "%";
    number.textContent = p[k] > 0 ? (p[k] < 0.0005 ? "<0.001" : p[k].toFixed(3)) : "removed";
    row.className = "bar" + (k === came ? " came" : "") + (p[k] > 0 ? "" : " removed");
  });
}

for (const slider of [T, P, M]) slider.addEventListener("input", show);
for (const button of document.querySelectorAll("button.preset"))
  button.addEventListener("click", () => {
    [T.value, P.value, M.value] = button.dataset.values.split(" ");
    show();
  });
$("passage").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  chosen = Math.min(Math.max(chosen + step, 0), letters.length - 1);
  show();
});
show();
