"""States over HTTP: `fam serve` and what it is made of.

`engine` is the one thread that runs the model: it decodes all answers in one batch and reads texts in slices between.
`store` keeps states in a folder or at another fsspec address, `states` the last used ones in RAM (`cache`), `memories`
knows whose they are and what may be done with them. Servers that share a store look records up in it (`catalogue`) and
change a memory one at a time (`claims`, `one_at_a_time`); `ray` and `ray_claims` are replicas on a Ray cluster.
`answers` makes what OpenAI's API says of it, `chat` the turns of a chat, `routes_...` and `app` the HTTP of it.
`schemas` has the bodies, `errors` how a refusal looks. `page/` is the page at `/`, plain HTML with lit-html; `facts`
and `attention` give it what it shows.

May import: `tools`, `tasks`, `weights`, `fam`, `decoder`, `files`, and the root of the package. FastAPI, uvicorn,
fsspec and prometheus-client are the extra `serve`; Ray is the extra `ray`, and only `ray` and `ray_claims` import it.
"""
