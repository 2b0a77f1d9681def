// On the page of errors: from a message that is pasted to the section that explains it.
(() => {
  const box = document.querySelector("#message");
  if (!box) return;

  const plain = text => text.replace(/\s+/g, " ").trim();
  const words = text => new Set(text.toLowerCase().match(/[a-z]{3,}/g) || []);
  const escaped = text => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const known = [...document.querySelectorAll("details li code")].map(code => {
    const fixed = plain(code.textContent).replace(/ \.\.\.$/, "").split(/<[^<>]*>/);
    return {
      code,
      words: words(fixed.join(" ")),
      pattern: new RegExp(fixed.map(escaped).join(".*?")),
      length: fixed.join("").trim().length,
    };
  });

  // Messages that fit come first: those that fit from the start on, then those with the most text of their own. Then
  // come messages that share words.
  const fit = (message, each) => {
    const match = each.length > 7 && each.pattern.exec(message);
    if (match) return each.length + (match.index ? 1 : 1000);
    const given = words(message);
    const shared = [...each.words].filter(word => given.has(word)).length;
    return shared > 2 ? shared / each.words.size : 0;
  };

  const sectionOf = code => {
    let place = code.closest("details");
    while (place && place.tagName !== "H2") place = place.previousElementSibling;
    return place;
  };

  const line = ({code}) => {
    const item = document.createElement("li");
    const link = document.createElement("a");
    const heading = sectionOf(code);
    link.href = `#${heading.id}`;
    link.textContent = heading.firstChild.textContent;
    link.onclick = () => { code.closest("details").open = true; };
    item.append(link, ": ", code.cloneNode(true));
    return item;
  };

  const found = document.querySelector("#found");
  box.oninput = () => {
    const message = plain(box.value).replace(/^(itrain|\w*(Error|Failed)): /, "");
    const ranked = known.map(each => [fit(message, each), each]).filter(([score]) => score > 0.5);
    ranked.sort((one, other) => other[0] - one[0]);
    const first = ranked.filter(([, {code}], at) => ranked.findIndex(other => sectionOf(other[1].code) === sectionOf(code)) === at);
    found.replaceChildren(...first.slice(0, 3).map(([, each]) => line(each)));
    if (message && !ranked.length) found.textContent = "No message of itrain is like this; it may be of another library.";
  };
  box.closest("div").hidden = false;
})();
