// A study's figure carries the code that made it.
const copyCode = {
  name: "Copy the code that made this",
  icon: { width: 16, height: 16, path: "M5 1h9v11h-3v3H2V4h3V1zm1 3h5v7h2V2H6v2zM3 5v9h7V5H3z", transform: "matrix(1 0 0 1 0 0)" },
  click: (figure) => navigator.clipboard.writeText(figure.layout.meta.code),
};

// Draws every figure of a page, from the data that stands where the figure shall be.
addEventListener("DOMContentLoaded", () => {
  for (const data of document.querySelectorAll("script[data-plotly]")) {
    const place = document.createElement("div");
    data.after(place);
    const { data: traces, layout, frames } = JSON.parse(data.textContent);
    const modeBarButtonsToAdd = layout?.meta?.code ? [copyCode] : [];
    const config = { responsive: true, displaylogo: false, modeBarButtonsToAdd };
    Plotly.newPlot(place, { data: traces, layout, frames, config });
  }
});
