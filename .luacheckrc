-- What the server's sandbox offers to a script, and no more.
std = "lua51"
read_globals = { "redis", "KEYS", "ARGV", "cjson", "cmsgpack", "struct", "bit" }
not_globals = { "debug", "dofile", "io", "loadfile", "module", "os", "package", "print", "require" }
max_line_length = 120

-- A script is sent with its includes put in: what they define at their top is defined in it, unless they are included
-- within a function, further in.
local folder = "celery_coalesce/store/lua/"

local function defined_in(library)
  local names = {}
  for line in io.lines(folder .. "lib/" .. library .. ".lua") do
    local other = line:match("^%-%-# include ([%w_]+)$")
    for _, name in ipairs(other and defined_in(other) or {}) do names[#names + 1] = name end
    local list = line:match("^local function ([%w_]+)") or line:match("^local ([%w_, ]+)") or ""
    for name in list:gmatch("[%w_]+") do names[#names + 1] = name end
  end
  return names
end

local function scripts_in(directory)
  local paths = {}
  for file in require("lfs").dir(directory) do
    if file:match("%.lua$") then paths[#paths + 1] = directory .. file end
  end
  return paths
end

for _, path in ipairs(scripts_in(folder)) do
  local included = {}
  for line in io.lines(path) do
    local library = line:match("^%-%-# include ([%w_]+)$")
    for _, name in ipairs(library and defined_in(library) or {}) do included[#included + 1] = name end
  end
  files[path] = { read_globals = included }
end

-- No library knows who uses what it defines. All are included in this order.
local before = {}
for _, library in ipairs({ "seen", "server", "record", "kept", "slots", "constraints", "note", "accept", "flights", "cleared",
                            "stopping" }) do
  local included = {}
  for _, name in ipairs(before) do included[#included + 1] = name end
  files[folder .. "lib/" .. library .. ".lua"] = { ignore = { "211" }, read_globals = included }
  for _, name in ipairs(defined_in(library)) do before[#before + 1] = name end
end

-- Of many calls, what one asks for is `asked` for as long as it is accepted.
files[folder .. "lib/accept.lua"].globals = { "asked" }
