// Draws every figure of a page, from the data that stands where the figure shall be.
addEventListener("DOMContentLoaded", () => {
  for (const data of document.querySelectorAll("script[data-plotly]")) {
    const place = document.createElement("div");
    data.after(place);
    const { data: traces, layout, frames } = JSON.parse(data.textContent);
    Plotly.newPlot(place, { data: traces, layout, frames, config: { responsive: true, displaylogo: false } });
  }
});
