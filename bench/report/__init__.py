"""What `duo-mlx bench run` found, as one page of HTML that needs no network, and as plots in files.

`rows` names results and their cells; `tradeoffs` and `costs` turn them into charts, which are data (`charts`);
`figures` makes a plotly figure of a chart and `static` draws it with matplotlib; `explorer` prepares the sampled
text's routes, and `page` puts everything together. Whatever a result says is shown as text and never as markup.
"""
