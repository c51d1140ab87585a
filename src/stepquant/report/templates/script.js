// The page is whole without this: every image stands in a row of its own. The script lays full precision over the others.
document.documentElement.classList.add("scripted");
for (const tile of document.querySelectorAll(".tile")) {
  const exact = document.getElementById(tile.dataset.exact);
  const over = document.createElement("img");
  over.src = exact.src;
  over.alt = "";
  over.className = "over";
  tile.append(over);
  tile.tabIndex = 0;
  tile.addEventListener("click", () => tile.classList.toggle("held"));
  tile.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); tile.classList.toggle("held"); }
  });
}
const slider = document.querySelector(".slider input");
const cut = () => {
  document.documentElement.style.setProperty("--cut", slider.value + "%");
  document.documentElement.style.setProperty("--edge", slider.value > 0 && slider.value < 100 ? 1 : 0);
};
slider.addEventListener("input", cut);
cut();
addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details")) part.open = true; });
