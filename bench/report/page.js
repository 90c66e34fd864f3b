// The charts in the reader's theme, and a table that sorts. Texts of results only become text nodes or chart labels.
const report = JSON.parse(document.getElementById("data").textContent);

const dark = matchMedia("(prefers-color-scheme: dark)");
const config = {
  responsive: true,
  displaylogo: false,
  displayModeBar: !matchMedia("(max-width: 40rem)").matches,
  typesetMath: false,
  modeBarButtons: [["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
  showSendToCloud: false, // plotly's own default is a button that sends the chart to a server
  plotlyServerURL: "",
};

function draw() {
  for (const box of document.querySelectorAll(".chart")) {
    const figure = report.charts[box.dataset.key][dark.matches ? "dark" : "light"];
    Plotly.react(box, figure.data, figure.layout, config);
  }
}
draw();
dark.addEventListener("change", draw);

function sortBy(column) {
  const table = document.getElementById("cells");
  const heads = [...table.tHead.rows[0].cells];
  const up = heads[column].getAttribute("aria-sort") !== "ascending";
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
  const compare = (one, other) => {
    const [a, b] = [one, other].map((row) => row.cells[column]);
    if ("value" in a.dataset && "value" in b.dataset) return (a.dataset.value - b.dataset.value) * (up ? 1 : -1);
    if ("value" in a.dataset || "value" in b.dataset) return "value" in a.dataset ? -1 : 1; // what is not known, last
    return a.textContent.localeCompare(b.textContent) * (up ? 1 : -1);
  };
  for (const body of table.tBodies) {
    body.append(...[...body.rows].filter((row) => row.className !== "machine-row").sort(compare));
  }
}
document.querySelectorAll("#cells thead button").forEach((button, column) => {
  button.addEventListener("click", () => sortBy(column));
});
