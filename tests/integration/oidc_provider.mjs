// A real OpenID provider (npm's oidc-provider), with its own pages to log in. argv: port, file of its keys.
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const GROUPS = { al: ["ml-ops"], ed: ["ml-ops", ...Array.from({ length: 300 }, (_, n) => `/departments/group-${n}`)] };

const [, , root, port, keys] = process.argv;
const require = createRequire(path.join(root, "package.json"));
const { Provider } = await import(pathToFileURL(require.resolve("oidc-provider")));
const issuer = `http://127.0.0.1:${port}`;
const redirects = ["http://127.0.0.1/callback", "http://127.0.0.1/ui/oidc/callback"];
const provider = new Provider(issuer, {
  jwks: { keys: JSON.parse(fs.readFileSync(keys)) },
  clients: [
    {
      client_id: "fedtide",
      application_type: "native", // any port of the loopback address (RFC 8252, 7.3)
      token_endpoint_auth_method: "none",
      redirect_uris: redirects,
      grant_types: ["authorization_code", "refresh_token", "urn:ietf:params:oauth:grant-type:device_code"],
      id_token_signed_response_alg: "ES256",
    },
  ],
  features: { devInteractions: { enabled: true }, deviceFlow: { enabled: true } },
  conformIdTokenClaims: false,
  claims: { openid: ["sub", "groups"], email: ["email"], profile: [] },
  scopes: ["openid", "offline_access", "email", "profile"],
  cookies: { keys: ["a secret of a test"] },
  findAccount: (_, id) => ({
    accountId: id,
    claims: () => ({ sub: id, email: `${id}@example.com`, groups: GROUPS[id] ?? ["nobody"] }),
  }),
});
provider.listen(Number(port), "127.0.0.1", () => console.log("ready"));
